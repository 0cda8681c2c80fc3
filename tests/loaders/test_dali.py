"""Claims about the loader that decodes with DALI. Its GPU path needs a GPU."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import ArraySource, EvalOrder, TrainOrder, build_loader
from hpc_supcon.data.loaders import LoaderOptions
from hpc_supcon.errors import ConfigError, CorruptSample, DataError, LoaderDied

from ..devices import needs_cuda
from . import contract
from .contract import (
    BATCH,
    CROP,
    LoaderContract,
    N,
    ProcessResources,
    assert_nothing_left,
    open_train,
    save,
    write_folder,
)
from .extras import require

require("nvidia.dali", "pip install nvidia-dali-cuda130")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("jpegs"), suffix="jpg")


class TestDali(LoaderContract):
    name = "dali"

    @pytest.fixture
    def source(self, folder):
        return open_train(folder)

    def check_images(self, images, source):
        assert (images.float() - source.stack().float()).abs().mean() < 0.3


class TestDaliOnJpeg(TestDali):
    @pytest.fixture
    def source(self, jpegs):
        return open_train(jpegs)


load_all = partial(contract.load_all, "dali")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_that_need_no_resizing_are_those_of_pillow(tmp_path, suffix):
    source = open_train(write_folder(tmp_path, suffix=suffix, size=(20, 20)), image_size=20)
    assert (load_all(source)[0].int() - source.stack().int()).abs().max() <= 1


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "00.jpg"), ("P", "00.png"), ("RGBA", "00.png"), ("L", "00.png")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted_as_by_the_other_loaders(tmp_path, mode, name, channels):
    root = write_folder(tmp_path, size=(20, 20))
    (root / "train" / "a" / "00.png").unlink()
    save(root / "train" / "a" / name, mode=mode, size=(20, 20))
    source = open_train(root, image_size=20, channels=channels)
    assert (load_all(source)[0].int() - source.stack().int()).abs().max() <= 2


@pytest.mark.parametrize("crop", [None, CROP])
@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "text"])
def test_an_image_that_does_not_decode_is_named(damaged, kind, crop):
    source, index, path = damaged(kind)
    with pytest.raises(CorruptSample) as caught:
        load_all(source, crop=crop)
    assert str(path) in str(caught.value)
    assert f"image {index} of the set" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"), [("cmyk", "mode CMYK"), ("16 bit", "more than 8 bits"), ("gray", "mode L")]
)
def test_an_image_of_another_format_is_an_error(damaged, kind, message):
    source, _, path = damaged(kind)
    with pytest.raises(DataError, match=message) as caught:
        load_all(source, on_corrupt="replace")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "text"])
def test_a_corrupt_image_is_replaced_as_by_every_loader_and_loading_continues(damaged, kind):
    source, index, _ = damaged(kind)
    images, chosen, loader = load_all(source, on_corrupt="replace")
    assert loader.replaced == 1
    options = LoaderOptions(on_corrupt="replace")
    order = EvalOrder(N, 8)
    other = build_loader("resident", source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    theirs = torch.cat([b.index for b in other.epoch(0)])
    assert torch.equal(chosen, theirs)
    assert int(chosen[index]) != index
    expected = torch.stack([source.read(int(i)) for i in chosen])
    assert (images.float() - expected.float()).abs().mean() < 1


def test_damage_in_the_last_rows_is_found(tmp_path):
    """A JPEG that ends early decodes to gray rows in many libraries."""
    root = write_folder(tmp_path, suffix="jpg", size=(200, 200), quality=95)
    path = root / "train" / "a" / "05.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CorruptSample, match=str(path)):
        load_all(open_train(root))


def test_a_pipeline_that_hangs_is_reported_after_the_timeout(folder):
    options = LoaderOptions(timeout_s=0.5)
    source, order = open_train(folder), TrainOrder(N, BATCH)
    loader = build_loader("dali", source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    release, began, before = threading.Event(), time.monotonic(), ProcessResources()
    loader._decode = lambda *arguments: release.wait()
    with pytest.raises(LoaderDied, match=r"data\.loader=dali: no batch within data\.timeout_s=0\.5 s"):
        next(loader.epoch(0))
    assert time.monotonic() - began < 30
    release.set()
    assert_nothing_left(before)


def test_other_sources_are_refused(folder):
    train = open_train(folder)
    arrays = ArraySource(train.stack(), train.labels, train.classes)
    with pytest.raises(ConfigError, match="decodes image files"):
        build_loader("dali", arrays, TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")


@pytest.mark.parametrize("crop", [None, CROP])
def test_files_that_dali_refuses_are_decoded_by_pillow_and_no_others(folder, monkeypatch, crop):
    source = open_train(folder)
    whole, refused = source.encoded, b"\x89PNG\r\n\x1a\n" + bytes(40)
    expected, *_ = load_all(source, crop=crop)
    monkeypatch.setattr(source, "encoded", lambda i: (refused, whole(i)[1]) if i in (7, 8, 20) else whole(i))
    options, order = LoaderOptions(crop=crop, timeout_s=60), EvalOrder(len(source), 8)
    loader = build_loader("dali", source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    by_pillow, fill = [], loader._reader.fill
    loader._reader.fill = lambda out, epoch, index: (by_pillow.append(int(index[0])), fill(out, epoch, index))[1]
    try:
        batches = list(loader.epoch(0))
        assert sorted(by_pillow) == [7, 8, 20]
        by_pillow.clear()
        pipeline = loader._pipeline
        assert torch.equal(torch.cat([b.images for b in batches]), torch.cat([b.images for b in loader.epoch(0)]))
        assert loader._pipeline is pipeline  # known by now: no batch fails again
        assert sorted(by_pillow) == [7, 8, 20]
    finally:
        loader.close()
    assert torch.cat([b.index for b in batches]).tolist() == list(range(N))
    assert loader.replaced == 0
    images = torch.cat([b.images for b in batches])
    same = (images == expected).flatten(1).all(dim=1)
    assert set((~same).nonzero().flatten().tolist()) <= {7, 8, 20}
    assert (images.int() - expected.int()).abs().float().mean() < 1


def test_a_dali_that_decodes_nothing_is_reported(folder, monkeypatch):
    source = open_train(folder)

    def build(loader):
        raise RuntimeError("no memory\non the device")

    monkeypatch.setattr("hpc_supcon.data.loaders.dali.DaliLoader._build", build)
    with pytest.raises(LoaderDied, match=r"DALI failed, and not because of an image: no memory on the device"):
        load_all(source)


@needs_cuda
def test_the_gpu_agrees_with_the_cpu(tmp_path: Path):
    root = write_folder(tmp_path, suffix="jpg", size=(80, 64))
    source = open_train(root)
    for crop in (None, CROP):
        images = load_all(source, device="cuda", crop=crop)[0]
        assert images.is_cuda
        assert (images.cpu().float() - load_all(source, crop=crop)[0].float()).abs().mean() < 3


@pytest.mark.parametrize("shape", [(480, 360), (360, 480), (40, 30), (200, 9)])
def test_images_that_are_not_square_are_resized_as_by_pillow(tmp_path, shape):
    """Smooth and lossless: what is left is the rounding of two resizers, not half a pixel between two boxes."""
    root = write_folder(tmp_path, size=shape)
    source = open_train(root, image_size=64)
    difference = (load_all(source)[0].float() - source.stack().float()).abs()
    assert difference.mean() < 0.2
    assert difference.max() <= 2


def test_of_a_wide_image_the_central_square_is_loaded(tmp_path):
    root = write_folder(tmp_path)
    pixels = np.zeros((64, 192, 3), dtype=np.uint8)
    pixels[:, 64:128] = 200
    Image.fromarray(pixels).save(root / "train" / "a" / "00.png")
    images = load_all(open_train(root))[0]
    assert (images[0][:, :, 1:-1] == 200).all()
