"""A trained model outside its run: files for other programs, embeddings and predictions of any images."""

from .exporter import ExportedFile, export_part
from .formats import FORMATS
from .images import ImageSet, open_images
from .inference import Predictions, embed, predict
from .model_folder import load_pushed
from .parts import PARTS, ModelPart, load_part
from .pushing import Pushed, push

__all__ = [
    "FORMATS",
    "PARTS",
    "ExportedFile",
    "ImageSet",
    "ModelPart",
    "Predictions",
    "Pushed",
    "embed",
    "export_part",
    "load_part",
    "load_pushed",
    "open_images",
    "predict",
    "push",
]
