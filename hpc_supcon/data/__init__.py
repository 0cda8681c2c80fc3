"""Data: sources (name -> images and labels), order (pure permutation), loaders and views (augmentation)."""

from .batch import Batch, Loader
from .beton import BetonSource, open_beton
from .loaders import LOADERS, CropOptions, LoaderOptions, build_loader, replaced_everywhere
from .order import EvalOrder, Order, TrainOrder
from .sources import ArraySource, Source, channel_statistics
from .splits import SOURCES, Splits, load_splits
from .stratify import stratified_split
from .views import EvalTransform, Views

__all__ = [
    "LOADERS",
    "SOURCES",
    "ArraySource",
    "Batch",
    "BetonSource",
    "CropOptions",
    "EvalOrder",
    "EvalTransform",
    "Loader",
    "LoaderOptions",
    "Order",
    "Source",
    "Splits",
    "TrainOrder",
    "Views",
    "build_loader",
    "channel_statistics",
    "load_splits",
    "open_beton",
    "replaced_everywhere",
    "stratified_split",
]
