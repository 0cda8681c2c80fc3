"""Data: sources (name -> images and labels), order (pure permutation), loaders and views (augmentation)."""

from .batch import Batch, Loader
from .beton import BetonSource, open_beton
from .loaders import LOADERS, CropOptions, LoaderOptions, build_loader, choose, replaced_everywhere
from .normalise import EvalTransform
from .order import EvalOrder, Order, TrainOrder
from .parameters import ViewParameters
from .samplers import SAMPLERS, ClassBalanced, LongTailAware, build_order
from .sources import ArraySource, Source, channel_statistics
from .splits import SOURCES, Splits, convert_splits, load_splits, open_source
from .statistics import normalisation_of
from .stratify import stratified_split
from .views import POLICIES, Views

__all__ = [
    "LOADERS",
    "POLICIES",
    "SAMPLERS",
    "SOURCES",
    "ArraySource",
    "Batch",
    "BetonSource",
    "ClassBalanced",
    "CropOptions",
    "EvalOrder",
    "EvalTransform",
    "Loader",
    "LoaderOptions",
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
    "choose",
    "convert_splits",
    "load_splits",
    "normalisation_of",
    "open_beton",
    "open_source",
    "replaced_everywhere",
    "stratified_split",
]
