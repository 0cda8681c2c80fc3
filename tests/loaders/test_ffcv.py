"""Claims about the loader of .beton files."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import EvalOrder, TrainOrder, build_loader, load_splits
from hpc_supcon.data.loaders import CropOptions, LoaderOptions, choose_loader
from hpc_supcon.data.loaders.sample_reader import SampleReader
from hpc_supcon.data.sources.beton import open_beton
from hpc_supcon.data.sources.convert import convert
from hpc_supcon.errors import ConfigError, CorruptSample, LoaderDied

from . import contract
from .contract import BATCH, CROP, LoaderContract, N, ProcessResources, assert_nothing_left, open_train, write_folder
from .extras import require

require("ffcv", "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++; pip install ffcv")


@pytest.fixture(scope="module")
def beton(folder, tmp_path_factory):
    """26 raw images of 80x64 pixels."""
    path = tmp_path_factory.mktemp("beton") / "raw.beton"
    convert(open_train(folder), path, raw_fraction=1.0)
    return path


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """26 JPEGs of 40x40 pixels."""
    root = tmp_path_factory.mktemp("jpegs")
    convert(open_train(write_folder(root, suffix="jpg", size=(40, 40), quality=95)), root / "jpg.beton")
    return root / "jpg.beton"


class TestFfcv(LoaderContract):
    name = "ffcv"

    @pytest.fixture
    def source(self, beton):
        return open_beton(beton, image_size=16)

    def check_images(self, images, source):
        """FFCV's JPEG decoder takes a fast, less exact transform."""
        assert (images.float() - source.stack().float()).abs().mean() < 2


class TestFfcvOnJpeg(TestFfcv):
    @pytest.fixture
    def source(self, jpegs):
        return open_beton(jpegs, image_size=16)


load_all = partial(contract.load_all, "ffcv")


def test_raw_images_that_need_no_resizing_are_unchanged(tmp_path):
    train = load_splits("synthetic", synthetic={"images": 70, "classes": 5}, validation_fraction=0).train
    convert(train, tmp_path / "a.beton", raw_fraction=1.0)
    assert torch.equal(load_all(open_beton(tmp_path / "a.beton"))[0], train.stack())


@pytest.mark.parametrize("crop", [None, CropOptions(2, 64, scale=(0.02, 1.0))])
@pytest.mark.parametrize("shape", [(360, 480), (480, 360), (64, 64), (40, 30), (70, 50), (9, 200)])
def test_raw_images_are_resized_as_by_pillow_to_a_level(tmp_path, shape, crop):
    """Shrunk and enlarged, square or not; noise, in which a shift of a tenth of a pixel shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        for split in ("train", "test"):
            path = tmp_path / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(image).save(path)
    convert(open_train(tmp_path), tmp_path / "a.beton", raw_fraction=1.0)
    source = open_beton(tmp_path / "a.beton", image_size=64)
    expected = np.empty((2, *([2] if crop else []), 3, 64, 64), dtype=np.uint8)
    SampleReader(source, 0, crop, "fail").fill(expected, 0, np.arange(2))
    images = load_all(source, EvalOrder(2, 2), crop=crop)[0]
    assert (images.int() - torch.from_numpy(expected).int()).abs().max() <= 1


def test_jpegs_decode_nearly_as_with_pillow(jpegs):
    source = open_beton(jpegs)
    difference = (load_all(source)[0].float() - source.stack().float()).abs()
    assert difference.max() <= 16  # FFCV asks for the fast, less exact transform
    assert difference.mean() < 2


def test_gray_images_have_one_channel(tmp_path):
    digits = load_splits("digits", validation_fraction=0).test
    for fraction in (0.0, 1.0):
        convert(digits, tmp_path / "a.beton", raw_fraction=fraction)
        source = open_beton(tmp_path / "a.beton")
        images = load_all(source)[0]
        assert images.shape == (len(digits), 1, 8, 8)
        assert (images.float() - source.stack().float()).abs().max() <= (16 if fraction == 0 else 0)


def test_a_subset_loads_its_own_images(beton):
    whole = open_beton(beton, image_size=16)
    images, index, _ = load_all(whole.subset([20, 3, 7]))
    assert index.tolist() == [0, 1, 2]
    assert torch.equal(images, load_all(whole)[0][[20, 3, 7]])


def test_ffcvs_own_loader_reads_our_files_to_the_same_pixels(jpegs):
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    threads = torch.get_num_threads()
    theirs = Loader(
        str(jpegs),
        batch_size=N,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()]},
    )
    images, labels = next(iter(theirs))
    torch.set_num_threads(threads)
    source = open_beton(jpegs)
    assert torch.equal(torch.as_tensor(images).permute(0, 3, 1, 2), load_all(source)[0])
    assert torch.equal(torch.as_tensor(labels).flatten(), source.labels)


# ---- damage


@pytest.fixture
def corrupt(jpegs, tmp_path):
    """The file with sample 9 overwritten after its first `keep` bytes, opened without a check of its hash."""

    def make(keep: int):
        path = tmp_path / jpegs.name
        data = np.fromfile(jpegs, dtype=np.uint8)
        columns = open_beton(jpegs).columns
        ptr, size = int(columns["ptr"][9]), int(columns["size"][9])
        data[ptr + min(keep, size * 2 // 3) : ptr + size] = 0
        data.tofile(path)
        (tmp_path / f"{jpegs.name}.json").write_bytes((jpegs.parent / f"{jpegs.name}.json").read_bytes())
        return open_beton(path, check_hash=False)

    return make


@pytest.mark.parametrize("crop", [None, CROP])
@pytest.mark.parametrize("keep", [0, 30, 100_000])
def test_a_sample_that_does_not_decode_is_named(corrupt, keep, crop):
    with pytest.raises(CorruptSample, match=r"jpg\.beton: sample 9 does not decode: .*\(image 9 of the set\)"):
        load_all(corrupt(keep), crop=crop)


@pytest.mark.parametrize("keep", [0, 30, 100_000])
def test_a_sample_that_does_not_decode_is_replaced_as_by_every_loader(corrupt, keep):
    source = corrupt(keep)
    images, index, loader = load_all(source, on_corrupt="replace")
    assert loader.replaced == 1
    assert (index != torch.arange(N)).nonzero().flatten().tolist() == [9]
    assert torch.equal(images[9], source.read(int(index[9])))
    options = LoaderOptions(on_corrupt="replace")
    order = EvalOrder(N, 8)
    other = build_loader("resident", source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    assert torch.equal(index, torch.cat([b.index for b in other.epoch(0)]))


def test_an_exception_in_a_thread_reaches_the_caller(jpegs):
    source = open_beton(jpegs)
    assert len(source.bytes) > 0  # mapped as long as the source exists
    loader = build_loader("ffcv", source, EvalOrder(N, 5), seed=0, rank=0, world_size=1, device="cpu")

    def broken(*arguments):
        raise ZeroDivisionError("in a thread")

    before = ProcessResources()
    loader._kernel = broken
    with pytest.raises(LoaderDied, match=r"data\.loader=ffcv: ZeroDivisionError: in a thread"):
        list(loader.epoch(0))
    assert_nothing_left(before)


def test_a_thread_that_hangs_is_reported_after_the_timeout(jpegs):
    options, source = LoaderOptions(timeout_s=0.5), open_beton(jpegs)
    assert len(source.bytes) > 0  # mapped as long as the source exists
    loader = build_loader(
        "ffcv", source, EvalOrder(N, 5), seed=0, rank=0, world_size=1, device="cpu", options=options
    )
    release, began, before = threading.Event(), time.monotonic(), ProcessResources()
    loader._kernel = lambda *arguments: release.wait()
    with pytest.raises(LoaderDied, match=r"no batch within data\.timeout_s=0\.5 s"):
        list(loader.epoch(0))
    assert time.monotonic() - began < 30
    release.set()
    assert_nothing_left(before)


def test_other_sources_are_refused(folder):
    with pytest.raises(ConfigError, match=r"reads \.beton files.*hpc-supcon convert"):
        build_loader("ffcv", open_train(folder), TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")


def test_auto_takes_ffcv_for_crops_from_a_beton_file(jpegs):
    source = open_beton(jpegs)
    assert choose_loader(source, "cpu", LoaderOptions(crop=CROP))[0] == "ffcv"
    assert choose_loader(source, "cpu", LoaderOptions())[0] == "resident"
