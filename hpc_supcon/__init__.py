"""hpc_supcon: supervised contrastive learning of images, from one CPU to a Slurm cluster.

    import hpc_supcon as hs

    run = hs.pretrain("quickstart", run_dir="runs/first")
    hs.probe(run, kind="knn")
    run.show()

The names in `__all__` are public, and documented where they are defined; every other name may change. PyTorch is
imported with the first of them that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        Callback,
        Config,
        HpcSupconError,
        Run,
        StopTraining,
        Table,
        embed,
        load,
        pretrain,
        probe,
        prune,
        report,
        views,
    )

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


if not TYPE_CHECKING:  # to a type checker, any name would be one of the module's

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(import_module(".api", __name__), name)
        from .renamed import NAMES

        if name in NAMES:
            from .old_names import warn_old_name

            new, gone_in = NAMES[name]
            warn_old_name(f"{__name__}.{name}", f"{__name__}.{new}", gone_in, "import hpc_supcon")
            return getattr(import_module(".api", __name__), new)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
