from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from hpc_supcon.data.crop_boxes import crop_boxes

from .contract import CROP, N, open_train, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Read-only: 26 PNG images of 80x64 pixels."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def reference_crops():
    """Crops by torchvision from the whole image: uint8 [N, V, 3, S, S]."""

    def crops(source, epoch):
        images = [source.pil_image(i) for i in range(len(source))]
        heights, widths = torch.tensor([(image.height, image.width) for image in images]).T.numpy()
        ranges = {"views": CROP.views, "scale": CROP.scale, "ratio": CROP.ratio}
        boxes = crop_boxes(0, epoch, torch.arange(N).numpy(), heights, widths, **ranges).tolist()
        size = [CROP.image_size] * 2
        return torch.stack(
            [
                torch.stack([TF.resized_crop(TF.pil_to_tensor(image), *box, size, antialias=True) for box in own])
                for image, own in zip(images, boxes, strict=True)
            ]
        )

    return crops


@pytest.fixture
def damaged(tmp_path):
    """damaged(kind) -> (source, index, path): a folder of PNGs with one bad image at that index."""

    def make(kind: str, **options: object):
        root = write_folder(tmp_path / "images", suffix="jpg", size=(40, 40))
        path = root / "train" / "b" / "02.jpg"
        whole = path.read_bytes()
        if kind == "truncated":
            path.write_bytes(whole[: len(whole) * 2 // 3])
        elif kind == "zero bytes":
            path.write_bytes(b"")
        elif kind == "text":
            path.write_text("this is not an image\n" * 50)
        elif kind == "cmyk":
            Image.open(path).convert("CMYK").save(path)
        elif kind == "16 bit":
            Image.new("I;16", (40, 40), 40_000).save(path, format="png")
        elif kind == "gray":
            Image.open(path).convert("L").save(path)
        return open_train(root, **options), 15, path

    return make
