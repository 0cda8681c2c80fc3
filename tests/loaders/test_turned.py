"""Every loader serves images turned upright, or none does: its own decoder's rule for EXIF data is of no account.

The torch loader reads what the resident one does.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from hpc_supcon.data import EvalOrder, build_loader, open_beton
from hpc_supcon.data.loaders import LoaderOptions
from hpc_supcon.data.sources.convert import convert

from .contract import N, open_train, save, write_folder
from .extras import require

ORIENTATION = 0x0112
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """JPEGs of one picture in all eight orientations, among others."""
    root = write_folder(tmp_path_factory.mktemp("turned"), suffix="jpg", size=(48, 48))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        save(root / "train/a" / f"{orientation:02d}.jpg", seed=5, size=(48, 48), exif=exif, quality=95)
    return root


@pytest.mark.parametrize("exif", ["transpose", "ignore"])
@pytest.mark.parametrize("name", ["resident", "ffcv", "dali"])
def test_every_loader_turns_images_as_the_setting_says(root, tmp_path, name, exif):
    if name in PACKAGES:
        require(PACKAGES[name], f"pip install 'hpc-supcon[{name}]'")
    folder = source = open_train(root, exif=exif)
    if name == "ffcv":
        convert(folder, tmp_path / "a.beton")
        source = open_beton(tmp_path / "a.beton", image_size=16)
    options = LoaderOptions(workers=1)
    loader = build_loader(name, source, EvalOrder(N, N), seed=0, rank=0, world_size=1, device="cpu", options=options)
    (batch,) = loader.epoch(0)
    images = batch.images.clone()
    loader.close()
    assert (images.float() - folder.stack().float()).abs().flatten(1).mean(dim=1).max() < 6
    same = [(images[1].float() - image.float()).abs().mean() < 6 for image in images[1:9]]
    assert torch.tensor(same).sum() == (8 if exif == "ignore" else 1)
