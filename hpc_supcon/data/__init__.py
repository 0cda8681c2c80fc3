"""Data: sources (name -> images and labels), order (pure permutation), loaders and views (augmentation)."""

from .corruptions import CORRUPTIONS, SEVERITIES, corrupt
from .fingerprint import DataFingerprint, class_differences, fingerprint
from .levels import bits_of, check_depth, dtype_of, full_scale, is_picture, random_levels
from .loaders import LOADERS, CropOptions, LoaderOptions, build_loader, choose_loader, replaced_on_all_ranks
from .loaders.base import Batch, Loader
from .order import EvalOrder, Order, TrainOrder
from .samplers import SAMPLERS, ClassBalanced, LongTailAware, build_order
from .sources.beton import BetonSource, open_beton
from .sources.by_name import OWN_SOURCES, SOURCES
from .sources.datasets import Datasets, dataset_splits
from .sources.huggingface import HUB
from .sources.listing import Note
from .sources.source import ArraySource, Source, channel_statistics, normalization_of, pixel_dtype
from .sources.splits import Splits, convert_splits, load_splits, open_source
from .sources.stratify import stratified_sample, stratified_split
from .sources.tables import Columns
from .views.multi_crop import ImageViews, MultiCrop
from .views.parameters import ViewParameters
from .views.pixels import EvalTransform
from .views.policies import POLICIES
from .views.views import Views

__all__ = [
    "CORRUPTIONS",
    "HUB",
    "LOADERS",
    "OWN_SOURCES",
    "POLICIES",
    "SAMPLERS",
    "SEVERITIES",
    "SOURCES",
    "ArraySource",
    "Batch",
    "BetonSource",
    "ClassBalanced",
    "Columns",
    "CropOptions",
    "DataFingerprint",
    "Datasets",
    "EvalOrder",
    "EvalTransform",
    "ImageViews",
    "Loader",
    "LoaderOptions",
    "LongTailAware",
    "MultiCrop",
    "Note",
    "Order",
    "Source",
    "Splits",
    "TrainOrder",
    "ViewParameters",
    "Views",
    "bits_of",
    "build_loader",
    "build_order",
    "channel_statistics",
    "check_depth",
    "choose_loader",
    "class_differences",
    "convert_splits",
    "corrupt",
    "dataset_splits",
    "dtype_of",
    "fingerprint",
    "full_scale",
    "is_picture",
    "load_splits",
    "normalization_of",
    "open_beton",
    "open_source",
    "pixel_dtype",
    "random_levels",
    "replaced_on_all_ranks",
    "stratified_sample",
    "stratified_split",
]
