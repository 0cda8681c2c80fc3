"""Images of any form through a run's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data import ArraySource, Source
from ..data.sources.datasets import dataset_splits
from ..data.sources.source import fit_images
from ..distributed.devices import choose_device
from ..errors import ConfigError, DataError, unknown_name
from ..export.images import ImageSet, open_images
from ..export.inference import run_part
from .run import Run

Images = Tensor | str | Path | Sequence[str | Path] | Any
"""What `embed` reads."""
EMBEDDED = ("encoder", "projection")


def embed(
    run: Run | str | Path, images: Images, *, part: str = "encoder", batch_size: int = 256, device: str = "auto"
) -> Tensor:
    """Embed images by the encoder of a run.

    Images of another size or number of channels are converted as in training: the shorter side is resized (pixels)
    and the central square kept, gray is repeated or RGB becomes its luminance. They are normalized as the run's own.
    This is the work of one process, also under torchrun.

    Args:
        run: a run or its folder.
        images: uint8 [N, C, S, S] or [C, S, S] with C 1 or 3, values 0..255; a torch Dataset of images or (image,
            label); a path or several, of image files, folders of any depth or a .beton file, whose images are then in
            the order of their paths.
        part: "encoder" for features, "projection" for the embeddings that the loss reads.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".

    Returns:
        float32 [N, D] on the CPU; D is `run.encoder.feature_dim` or `model.projection_dim`.

    Raises:
        DataError: images of another form, or that do not decode.
        ConfigError: an unknown part or device; an encoder of Python that was not given.
        RunFolderError: no run folder, no checkpoint in it, or no projection.
        CheckpointCorrupt: the checkpoint does not verify.

    Source:
        Features before the projection serve transfer better: Chen et al. 2020 (arXiv 2002.05709), section 4.2.
    """
    run = run if isinstance(run, Run) else Run(run)
    if part not in EMBEDDED:
        raise ConfigError(unknown_name("part", part, EMBEDDED))
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    loaded = run._part(part)
    opened = _opened(images, loaded.shape, run.config)
    try:
        outputs = run_part(loaded, opened, device=choose_device(device), batch_size=batch_size)
    finally:
        loaded.module.cpu()
    return torch.from_numpy(outputs.values)


def _opened(images: Images, shape: tuple[int, int, int], config: Config) -> ImageSet:
    if isinstance(images, str | Path):
        return open_images([Path(images)], shape, (), exif=config.data.exif)
    if isinstance(images, list | tuple) and images and all(isinstance(path, str | Path) for path in images):
        return open_images([Path(path) for path in images], shape, (), exif=config.data.exif)
    channels, size, _ = shape
    source: Source
    if isinstance(images, Tensor):
        source = _of_tensor(images, channels, size)
    else:
        source = dataset_splits(images, image_size=size, channels=channels, has_labels=False, origin="images")[0]
    return ImageSet(source, tuple(map(str, range(len(source)))), None, ())


def _of_tensor(images: Tensor, channels: int, size: int) -> ArraySource:
    batch = images[None] if images.ndim == 3 else images
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] not in (1, 3) or not len(batch):
        raise DataError(
            f"images: {str(images.dtype).removeprefix('torch.')} {list(images.shape)}, not uint8 [N, C, S, S] with C "
            "1 or 3: give pixels as they are, 0 to 255; they are normalized here"
        )
    if batch.shape[2] != batch.shape[3]:
        raise DataError(f"images: {batch.shape[3]}x{batch.shape[2]} pixels are not square: crop them before")
    fitted = fit_images(batch.cpu(), image_size=size, channels=channels)
    return ArraySource(fitted, torch.zeros(len(fitted), dtype=torch.int64), ())
