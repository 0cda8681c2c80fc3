"""The public Python API: what `import hpc_supcon as hs` offers. `hpc_supcon.__all__` lists its names."""

from ..config import Config
from ..errors import HpcSupconError
from ..training.callbacks import Callback, StopTraining
from .augmented import views
from .inference import embed
from .run import Run
from .stages import load, pretrain, probe, prune, report
from .table import Table

__all__ = [
    "Callback",
    "Config",
    "HpcSupconError",
    "Run",
    "StopTraining",
    "Table",
    "embed",
    "load",
    "pretrain",
    "probe",
    "prune",
    "report",
    "views",
]
