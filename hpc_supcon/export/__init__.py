"""A trained model outside its run: files for other programs, embeddings and predictions of any images."""

from .exporter import Exported, export_part
from .formats import FORMATS
from .images import Pictures, open_pictures
from .parts import PARTS, Part, load_part
from .predict import Predictions, embed, predict

__all__ = [
    "FORMATS",
    "PARTS",
    "Exported",
    "Part",
    "Pictures",
    "Predictions",
    "embed",
    "export_part",
    "load_part",
    "open_pictures",
    "predict",
]
