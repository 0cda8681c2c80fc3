"""Data: sources (name -> images and labels), order (pure permutation), loaders and views (augmentation)."""

from .batch import Batch, Loader
from .loaders import LOADERS, build_loader
from .normalise import EvalTransform
from .order import EvalOrder, Order, TrainOrder
from .sources import ArraySource, Source, channel_statistics
from .splits import SOURCES, Splits, load_splits
from .stratify import stratified_split
from .views import POLICIES, ViewParameters, Views

__all__ = [
    "LOADERS",
    "POLICIES",
    "SOURCES",
    "ArraySource",
    "Batch",
    "EvalOrder",
    "EvalTransform",
    "Loader",
    "Order",
    "Source",
    "Splits",
    "TrainOrder",
    "ViewParameters",
    "Views",
    "build_loader",
    "channel_statistics",
    "load_splits",
    "stratified_split",
]
