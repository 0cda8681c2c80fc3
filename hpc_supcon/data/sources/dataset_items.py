"""The items of map-style torch Datasets: images and labels of many types, as pixels.

An image is a PIL image, a tensor [C, H, W] or [H, W], or an array [H, W, C] or [H, W], of uint8 or uint16; a label is
an int, an integer of numpy or a tensor of one integer.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ...errors import CorruptSample, DataError, raised_where
from ..levels import MAX_CHANNELS, PICTURE_CHANNELS
from .bands import Pixels
from .dataset_labels import IMAGES_ALONE
from .image_file import named


class MapDataset(Protocol):
    """What is used of a torch Dataset. It must give the same item for the same index, whenever it is asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class DatasetItems:
    """The items of a dataset, asked for by one thread at a time, because a dataset may keep an open file."""

    def __init__(self, dataset: MapDataset, name: str) -> None:
        """name: of the dataset in messages."""
        self.dataset, self.name = dataset, name
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        """(image, label) of item i, the label IMAGES_ALONE where it has none.

        Raises CorruptSample for whatever the dataset raises, DataError for an item of another form.
        """
        with self._lock:
            try:
                item = self.dataset[i]
            except Exception as error:
                raise CorruptSample(f"{self.name}: item {i} raised {raised_where(error)}") from error
        parts = tuple(item) if isinstance(item, tuple | list) else (item,)
        if not 1 <= len(parts) <= 2:
            raise DataError(f"{self.name}: item {i} has {len(parts)} parts; expected an image or (image, label)")
        return parts[0], parts[1] if len(parts) == 2 else IMAGES_ALONE

    def image(self, i: int) -> Image.Image | Pixels:
        """The image of item i, of any mode, or uint8 or uint16 [C, H, W]. Raises as `__getitem__`, and DataError for
        an image of another type or shape."""
        image, where = self[i][0], f"{self.name}: item {i}"
        if isinstance(image, Image.Image):
            with named(where):
                image.load()
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
            return image
        if not isinstance(image, Tensor | np.ndarray):
            raise DataError(f"{where} is of type {type(image).__name__}, not a PIL image, a tensor or an array")
        return _pixels(image, where)


def _pixels(image: Tensor | np.ndarray[Any, Any], where: str) -> Pixels:
    is_tensor = isinstance(image, Tensor)
    kind = "a tensor" if is_tensor else "an array"
    if (dtype := str(image.dtype).removeprefix("torch.")) not in ("uint8", "uint16"):
        raise DataError(
            f"{where} is {kind} of {dtype}, not uint8 (or uint16): return pixels as they are, 0 "
            "to 255, without transforms such as ToTensor and Normalize (images are normalized later, on the device)"
        )
    pixels: Pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    shape = tuple(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and not is_tensor:
        pixels = pixels.transpose(2, 0, 1)
    fits = pixels.ndim == 3 and 1 <= len(pixels) <= MAX_CHANNELS and 0 not in shape
    # of the other layout: nobody has images of 8 channels that are 3 pixels wide
    if not fits or (len(pixels) not in PICTURE_CHANNELS and set(PICTURE_CHANNELS) & set(pixels.shape[1:])):
        layout = "[channels, height, width]" if is_tensor else "[height, width, channels]"
        raise DataError(
            f"{where} is {kind} of shape {list(shape)}; expected {layout} with 1 to {MAX_CHANNELS} channels, or "
            "[height, width]"
        )
    return pixels
