"""A trained model outside its run: files for other programs, embeddings and predictions of any images."""

from .exporter import ExportedFile, export_part
from .formats import FORMATS
from .images import ImageSet, open_images
from .inference import Predictions, embed, predict
from .parts import PARTS, ModelPart, load_part

__all__ = [
    "FORMATS",
    "PARTS",
    "ExportedFile",
    "ImageSet",
    "ModelPart",
    "Predictions",
    "embed",
    "export_part",
    "load_part",
    "open_images",
    "predict",
]
