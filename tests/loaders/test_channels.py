"""Loaders of images of other than 1 or 3 channels and of 16 bits: the same pixels from each, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from hpc_supcon.data import (
    ArraySource,
    EvalOrder,
    TrainOrder,
    build_loader,
    choose_loader,
    convert_splits,
    load_splits,
)
from hpc_supcon.data.crop_boxes import crop_boxes
from hpc_supcon.data.loaders import CropOptions, LoaderOptions
from hpc_supcon.errors import ConfigError, CorruptSample, DataError

FORMS = [(5, np.uint16), (2, np.uint8), (1, np.uint16), (3, np.uint16)]
CROP = CropOptions(views=2, image_size=8)


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0]}x{np.dtype(form[1]).itemsize}")
def root(request, tmp_path_factory):
    """Two classes of 6 images of various sizes, of which one is damaged: .npy files."""
    folder, (channels, dtype) = tmp_path_factory.mktemp("bands"), request.param
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 1)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (20 + 3 * i, 24 + i, channels)
                image = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
                np.save(folder / split / name / f"{i}.npy", image)
    (folder / "train" / "b" / "4.npy").write_bytes(b"nothing")
    return folder, channels, dtype


def open_train(root):
    folder, channels, _ = root
    return load_splits("image_folder", root=folder, image_size=12, channels=channels, validation_fraction=0).train


def batches(name, source, order=None, crop=None, on_corrupt="replace", rank=0, world_size=1):
    options = LoaderOptions(workers=2, on_corrupt=on_corrupt, crop=crop)
    order = order or TrainOrder(len(source), 4)
    loader = build_loader(
        name, source, order, seed=7, rank=rank, world_size=world_size, device="cpu", options=options
    )
    try:
        return [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


def test_both_loaders_serve_what_the_source_reads(root):
    source = open_train(root)
    served = {name: batches(name, source) for name in ("resident", "torch")}
    for one, other in zip(*served.values(), strict=True):
        assert one.images.dtype == (torch.uint16 if root[2] is np.uint16 else torch.uint8)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)
        for image, i in zip(one.images, one.index.tolist(), strict=True):
            assert torch.equal(image, source.read(i))


@pytest.mark.parametrize("name", ["resident", "torch"])
def test_a_damaged_image_is_named_or_left_out(root, name):
    source = open_train(root)
    with pytest.raises(CorruptSample, match=r"4\.npy does not decode"):
        batches(name, source, on_corrupt="fail")
    shares = [
        batches(name, source, EvalOrder(len(source), 4), on_corrupt="leave_out", rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    index = torch.cat([batch.index for share in shares for batch in share])
    assert sorted(index.tolist()) == sorted([i for i in range(12) if i != 10] * 2)  # of two epochs


def test_crops_while_decoding_are_those_of_torchvision(root):
    source = open_train(root)
    for batch in batches("torch", source, crop=CROP)[:3]:
        for views, i in zip(batch.images, batch.index.tolist(), strict=True):
            stored = torch.from_numpy(np.load(source.paths[i]).transpose(2, 0, 1))
            sides = np.array([stored.shape[1]]), np.array([stored.shape[2]])
            boxes = crop_boxes(7, 0, np.array([i]), *sides, views=2, scale=CROP.scale, ratio=CROP.ratio)[0]
            for view, box in zip(views, boxes.tolist(), strict=True):
                # of the whole image: Pillow's filter reaches beyond the box
                expected = tv.resized_crop(stored.double(), *box, [8, 8], antialias=True)
                inner = (view.double() - expected)[:, 2:-2, 2:-2].abs()
                assert inner.max() <= 0.02 * torch.iinfo(torch.int16).max if view.dtype == torch.uint16 else 6


def test_crops_of_images_in_memory_are_those_of_torchvision(root):
    whole = [i for i in range(12) if i != 10]
    source = open_train(root).subset(whole)
    images = source.stack()
    for batch in batches("resident", ArraySource(images, source.labels, source.classes), crop=CROP)[:2]:
        for views, i in zip(batch.images, batch.index.tolist(), strict=True):
            side = np.array([12])
            boxes = crop_boxes(7, 0, np.array([i]), side, side, views=2, scale=CROP.scale, ratio=CROP.ratio)[0]
            for view, box in zip(views, boxes.tolist(), strict=True):
                expected = tv.resized_crop(images[i].double(), *box, [8, 8], antialias=True)
                assert (view.double() - expected).abs().max() <= 0.6


def test_loaders_of_pictures_refuse_other_images(root):
    folder, channels, dtype = root
    source, bits = open_train(root), 8 * np.dtype(dtype).itemsize
    for name in ("ffcv", "dali"):
        with pytest.raises(ConfigError, match=f"data.loader={name} decodes 8-bit .* have {channels} of {bits} bits"):
            batches(name, source)
    assert choose_loader(source, "cpu", LoaderOptions())[0] == "resident"
    splits = load_splits("image_folder", root=folder, image_size=12, channels=channels, validation_fraction=0)
    with pytest.raises(
        DataError, match=f"holds 8-bit images of 1 or 3 channels, but these have {channels} of {bits}"
    ):
        convert_splits("image_folder", splits, folder / "out.beton")
    assert not list(folder.glob("out*"))
