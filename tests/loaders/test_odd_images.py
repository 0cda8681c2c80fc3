"""Every odd image, with every loader: decoded as Pillow has it, replaced or left out, or refused by name.

The table is tests/data/odd_images.py. A loader whose package is missing is skipped, or fails where it is required.
"""

from __future__ import annotations

import io
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hpc_supcon.data import BetonSource, EvalOrder, TrainOrder, build_loader
from hpc_supcon.data.loaders import CropOptions, LoaderOptions
from hpc_supcon.data.loaders.sample_reader import SampleReader, find_replacement
from hpc_supcon.data.sources.folder import FolderSource, ImageFormat
from hpc_supcon.data.sources.source import ArraySource
from hpc_supcon.errors import CorruptSample, DataError

from ..data.odd_images import DAMAGED, ODD_IMAGES, REFUSED, WHOLE, OddImage, jpeg
from .extras import require

SIZE, EPOCH = 32, 3
CROP = CropOptions(views=2, image_size=24)
LOADERS = {  # name -> largest difference of a pixel from Pillow's, of smooth images
    "resident": 0,
    "torch": 0,
    "dali": 3,  # rounding of another resizer
    "ffcv": 16,  # the fast transform of its JPEG decoder
}
GUARD_S = 120
"""Whoever opens a FIFO that nobody writes to waits for ever; nothing else here takes a tenth of this."""


@pytest.fixture(autouse=True)
def _guard():
    def expired(*_):
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(GUARD_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def require_packages(loader):
    if loader == "dali":
        require("nvidia.dali", "pip install nvidia-dali-cuda130")
    elif loader == "ffcv":
        require("ffcv", "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++; pip install ffcv")


def folder_source(folder, images, *, channels=3):
    """A source over these files, whatever the listing of a folder makes of their names."""
    paths = [image.write(folder) for image in images]
    image_format = ImageFormat(channels, SIZE, convert=True, resize=True, reference=paths[0])
    return FolderSource(paths, torch.arange(len(paths)) % 2, ("a", "b"), image_format)


def beton_source(folder, images):
    """A .beton file of these JPEGs as they are, which `convert` would refuse or write anew."""
    data = [image.make() for image in images]
    sizes = np.array([size_of(file) for file in data])
    lengths = np.array([len(file) for file in data])
    ends = np.cumsum(lengths)
    (folder / "odd.beton").write_bytes(b"".join(data))
    columns = {
        "mode": np.zeros(len(data), dtype=np.uint8),
        "width": sizes[:, 0].astype(np.uint16),
        "height": sizes[:, 1].astype(np.uint16),
        "ptr": ends - lengths,
        "size": lengths,
    }
    rows = np.arange(len(data))
    return BetonSource(folder / "odd.beton", columns, rows, torch.arange(len(data)) % 2, ("a", "b"), 3, SIZE)


def size_of(data):
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        return 48, 36


def fits_into_beton(image):
    """JPEGs; `convert` turns them and makes RGB of them, and stores every other format anew."""
    return image.name.endswith(".jpg") and not image.name.startswith(("exif", "a-", "cmyk", "text", "empty", "huge"))


def pillows_pixels(path):
    """uint8 [3, SIZE, SIZE]: upright, without transparency, the shorter side resized and the center cropped."""
    with Image.open(path) as image:
        image.load()
        image.info.pop("transparency", None)
        upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = upright.size
    short = min(width, height)
    if max(width, height) > 1000:  # as below, but for the memory
        left, top = (width - short) // 2, (height - short) // 2
        upright = upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    else:
        upright = upright.resize((SIZE * width // short, SIZE * height // short), Image.Resampling.BILINEAR)
    left, top = (upright.width - SIZE) // 2, (upright.height - SIZE) // 2
    return np.asarray(upright.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)


@contextmanager
def opened(loader, source, order, rank=0, world_size=1, **options):
    options = LoaderOptions(**{"workers": 2, "timeout_s": 60, **options})
    loader = build_loader(
        loader, source, order, seed=0, rank=rank, world_size=world_size, device="cpu", options=options
    )
    try:
        yield loader
    finally:
        loader.close()


# ---- the source: what Pillow makes of each file


@pytest.mark.parametrize("image", ODD_IMAGES, ids=lambda image: image.name)
def test_the_source_decodes_or_names_every_file(tmp_path, image):
    source = folder_source(tmp_path, [image])
    if image.expectation == "decodes":
        assert np.abs(source.read(0).numpy().astype(int) - pillows_pixels(source.paths[0])).max() <= 1
        encoded, size = source.encoded(0)  # for every decoder the same
        with Image.open(io.BytesIO(encoded)) as other:
            assert other.size == size == source.pil_image(0).size
            assert other.mode in ("L", "RGB")
            assert other.getexif().get(0x0112, 1) == 1
            assert np.array_equal(np.asarray(other.convert("RGB")), np.asarray(source.pil_image(0)))
        return
    with pytest.raises(DataError) as caught:
        source.read(0)
    assert isinstance(caught.value, CorruptSample) == (image.expectation == "damaged")
    assert str(source.paths[0]) in str(caught.value)
    assert image.says in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- replaced and left out, by every loader


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Loader -> (its source of all files but the refused ones, which of them decode)."""
    folder = tmp_path_factory.mktemp("odd")
    images = sorted([*WHOLE, *DAMAGED], key=lambda image: image.name)
    jpegs = [image for image in images if fits_into_beton(image)]
    files, beton = folder_source(folder, images), beton_source(folder, jpegs)
    decodes = [image.expectation == "decodes" for image in images]
    of_beton = [image.expectation == "decodes" for image in jpegs]
    assert sum(of_beton) > 10 < len(of_beton) - sum(of_beton) + 5
    return {name: (beton, of_beton) if name == "ffcv" else (files, decodes) for name in LOADERS}


# the resident loader takes its crops from the resized images
CROPPED = [*((name, None) for name in LOADERS), *((name, CROP) for name in LOADERS if name != "resident")]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("name", "crop"), CROPPED, ids=lambda value: value if isinstance(value, str) else "")
def test_every_loader_replaces_the_damaged_images_by_the_same_ones(sets, name, world_size, crop):
    require_packages(name)
    source, decodes = sets[name]
    loaded, images, replaced = [], [], 0
    for rank in range(world_size):
        order = EvalOrder(len(source), 9)
        with opened(name, source, order, rank, world_size, on_corrupt="replace", crop=crop) as loader:
            batches = list(loader.epoch(EPOCH))
            replaced += loader.replaced
        loaded += [i for batch in batches for i in batch.index.tolist()]
        images += [batch.images for batch in batches]
        assert all(torch.equal(batch.labels, source.labels[batch.index]) for batch in batches)
    assert replaced == decodes.count(False)
    assert loaded == [
        i if decodes[i] else find_replacement(0, EPOCH, i, len(decodes), decodes.__getitem__, CorruptSample())
        for i in range(len(decodes))
    ]
    images = torch.cat(images)
    # a replacement has the crops of its own index
    expected = np.empty(images.shape, dtype=np.uint8)
    SampleReader(source, 0, crop, "fail").fill(expected, EPOCH, np.array(loaded))
    difference = (images.int() - torch.from_numpy(expected).int()).abs().flatten(1).max(dim=1).values
    worst = {(source.paths[i].name if name != "ffcv" else i): int(d) for i, d in zip(loaded, difference, strict=True)}
    assert max(worst.values()) <= LOADERS[name], worst


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_leaves_out_the_damaged_images(sets, name):
    require_packages(name)
    source, decodes = sets[name]
    with opened(name, source, EvalOrder(len(source), 9), on_corrupt="leave_out", workers=1) as loader:
        batches = list(loader.epoch(0))
        assert loader.replaced == 0
    assert len(batches) == loader.steps_per_epoch
    assert torch.cat([batch.index for batch in batches]).tolist() == np.flatnonzero(decodes).tolist()
    assert all(len(batch.images) == len(batch.labels) == len(batch.index) for batch in batches)


def test_a_second_epoch_replaces_again_and_training_goes_on(sets):
    require_packages("dali")
    source, _ = sets["dali"]
    order = TrainOrder(len(source), 8)
    with (
        opened("dali", source, order, on_corrupt="replace") as dali,
        opened("resident", source, order, on_corrupt="replace") as resident,
    ):
        for epoch in range(3):
            for ours, theirs in zip(dali.epoch(epoch), resident.epoch(epoch), strict=True):
                assert torch.equal(ours.index, theirs.index)
        assert dali.replaced == resident.replaced > 0


# ---- named, by every loader


SOUND = [OddImage(f"sound-{k}.jpg", jpeg, "decodes") for k in range(3)]


DAMAGED_FOR = [
    *((name, image) for name in ("resident", "dali") for image in DAMAGED),
    *(("ffcv", image) for image in DAMAGED if fits_into_beton(image)),
]


@pytest.mark.parametrize(("name", "image"), DAMAGED_FOR, ids=lambda value: getattr(value, "name", value))
def test_every_loader_names_a_damaged_image_where_the_policy_is_fail(tmp_path, name, image):
    require_packages(name)
    images = [*SOUND, image]
    if name == "ffcv":
        source, named = beton_source(tmp_path, images), "odd.beton: sample 3 does not decode"
    else:
        source, named = folder_source(tmp_path, images), image.name
    with pytest.raises(CorruptSample) as caught, opened(name, source, EvalOrder(4, 4), workers=1) as loader:
        list(loader.epoch(0))
    assert named in str(caught.value)
    assert name == "resident" or "image 3 of the set" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_name_a_damaged_image_on_the_rank_that_has_it(tmp_path, rank):
    source = folder_source(tmp_path, [*SOUND, OddImage("cut.jpg", lambda: jpeg()[:-200], "damaged")])
    with opened("torch", source, EvalOrder(4, 4), rank, 2, workers=1) as loader:
        if rank == 0:
            assert [batch.index.tolist() for batch in loader.epoch(0)] == [[0, 1]]
            return
        with pytest.raises(CorruptSample, match=r"cut\.jpg does not decode: .*image 3 of the set"):
            list(loader.epoch(0))


@pytest.mark.parametrize("image", REFUSED, ids=lambda image: image.name)
@pytest.mark.parametrize("name", ["resident", "torch", "dali"])
def test_no_loader_replaces_an_image_that_is_refused(tmp_path, name, image):
    require_packages(name)
    source = folder_source(tmp_path, [*SOUND, image])
    with (
        pytest.raises(DataError, match=image.says) as caught,
        opened(name, source, EvalOrder(4, 4), on_corrupt="replace", workers=1) as loader,
    ):
        list(loader.epoch(0))
    assert image.name in str(caught.value)
    assert not isinstance(caught.value, CorruptSample)


def test_a_set_that_is_damaged_altogether_is_named_by_every_loader(tmp_path):
    source = folder_source(tmp_path, [OddImage(f"{k}.jpg", lambda: jpeg()[:-200], "damaged") for k in range(3)])
    for name in ("resident", "torch", "dali"):
        with (
            pytest.raises(CorruptSample, match=r"\d\.jpg does not decode.*neither do 100 others") as caught,
            opened(name, source, EvalOrder(3, 3), on_corrupt="replace", workers=1) as loader,
        ):
            list(loader.epoch(0))
        assert "\n" not in str(caught.value)


def test_arrays_are_whole_whatever_the_policy():
    source = ArraySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"))
    for policy in ("fail", "replace", "leave_out"):
        with opened("resident", source, EvalOrder(4, 3), on_corrupt=policy) as loader:
            assert torch.cat([batch.index for batch in loader.epoch(0)]).tolist() == [0, 1, 2, 3]
