"""Data: sources (name -> images and labels), order (pure permutation), loaders and views (augmentation)."""

from .batch import Batch, Loader
from .loaders import LOADERS, build_loader
from .normalise import EvalTransform
from .order import EvalOrder, Order, TrainOrder
from .samplers import SAMPLERS, ClassBalanced, LongTailAware, build_order
from .sources import ArraySource, Source, channel_statistics
from .splits import SOURCES, Splits, load_splits
from .stratify import stratified_split
from .views import POLICIES, ViewParameters, Views

__all__ = [
    "LOADERS",
    "POLICIES",
    "SAMPLERS",
    "SOURCES",
    "ArraySource",
    "Batch",
    "ClassBalanced",
    "EvalOrder",
    "EvalTransform",
    "Loader",
    "LongTailAware",
    "Order",
    "Source",
    "Splits",
    "TrainOrder",
    "ViewParameters",
    "Views",
    "build_loader",
    "build_order",
    "channel_statistics",
    "load_splits",
    "stratified_split",
]
