"""Claims about what `convert` stores of odd images, and which files belong together."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hpc_supcon.data import ArraySource, load_splits, open_beton
from hpc_supcon.data.sources import jpeg
from hpc_supcon.data.sources.beton import manifest_path
from hpc_supcon.data.sources.convert import convert
from hpc_supcon.data.sources.splits import Splits, convert_splits, split_file
from hpc_supcon.errors import CorruptSample, DataError

from .contract import N, open_train, save, write_folder

ORIENTATION = 0x0112
NO_TURBOJPEG = "libturbojpeg IS NOT INSTALLED: WRONG ENTROPY-CODED DATA ARE NOT FOUND BEFORE A LOADER FINDS THEM"


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "images", suffix="jpg", size=(40, 30))


def stored(root, tmp_path, i=3, **options):
    """(bytes, image) of sample i of the folder's .beton."""
    convert(open_train(root), tmp_path / "a.beton", **options)
    source = open_beton(tmp_path / "a.beton", image_size=12)
    ptr, size = source.columns["ptr"][i], source.columns["size"][i]
    return source.bytes[ptr : ptr + size].tobytes(), source.pil_image(i)


def close(a, b):
    """As near as two JPEG encodings of a smooth image are."""
    return a.size == b.size and np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean() < 3


def insert(data, marker, stray):
    position = data.index(bytes((0xFF, marker)))
    return data[:position] + stray + data[position:]


@pytest.mark.parametrize("marker", [0xC0, 0xC4, 0xDA])
def test_a_jpeg_with_bytes_before_a_marker_is_encoded_anew(root, tmp_path, marker):
    path = root / "train/a/03.jpg"
    whole = path.read_bytes()
    path.write_bytes(insert(whole, marker, b"\x00\x17\x2a"))
    data, image = stored(root, tmp_path)
    assert jpeg.whole_jpeg(data) == data
    assert close(image, Image.open(io.BytesIO(whole)))


@pytest.mark.parametrize("after", [b"garbage", bytes(500), b"another image"])
def test_what_follows_the_end_of_a_jpeg_is_not_stored(root, tmp_path, after):
    path = root / "train/a/03.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole + (save(tmp_path / "b.jpg").read_bytes() if after == b"another image" else after))
    assert stored(root, tmp_path)[0] == whole


def test_a_jpeg_with_wrong_entropy_coded_data_is_encoded_anew(root, tmp_path):
    if jpeg._turbojpeg() is None:
        pytest.skip(NO_TURBOJPEG)
    path = root / "train/a/03.jpg"
    save(path, seed=3, size=(120, 90))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(1000):  # until Pillow accepts what libjpeg-turbo warns about
        data = bytearray(whole)
        data[rng.integers(len(data) // 2, len(data) - 2)] ^= int(rng.integers(1, 255))
        path.write_bytes(data)
        try:
            image = open_train(root).pil_image(3)
        except CorruptSample:
            continue
        if jpeg.whole_jpeg(bytes(data)) is None:
            break
    kept, again = stored(root, tmp_path)
    assert jpeg.whole_jpeg(kept) == kept
    assert close(again, image)


def test_the_structure_alone_tells_files_that_end_early(root):
    data = (root / "train/a/03.jpg").read_bytes()
    assert jpeg.whole_jpeg(data) == data
    for cut in (1, 2, 30, len(data) // 2, len(data) - 10):
        assert jpeg.whole_jpeg(data[:-cut]) is None
    for cut in range(2, len(data), 7):
        assert jpeg.whole_jpeg(data[:cut] + b"\xff\xd9") is None


def test_a_picture_of_several_in_one_file_is_stored_without_the_others(root, tmp_path):
    path = root / "train/a/03.jpg"
    with Image.open(path) as first, Image.open(root / "train/a/04.jpg") as second:
        first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])
    path.write_bytes((tmp_path / "a.mpo").read_bytes())
    with Image.open(path) as image:
        assert image.format == "MPO"
        assert close(stored(root, tmp_path)[1], image)


def test_turned_images_are_stored_turned_and_the_manifest_says_so(root, tmp_path):
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    path = save(root / "train/a/03.jpg", seed=8, size=(40, 30), exif=turned)
    data, image = stored(root, tmp_path)
    with Image.open(path) as original:
        assert close(image, ImageOps.exif_transpose(original))
        assert image.size == (30, 40)
    assert b"Exif" not in data
    assert json.loads(manifest_path(tmp_path / "a.beton").read_text())["exif"] == "transpose"
    convert(open_train(root, exif="ignore"), tmp_path / "b.beton")
    assert open_beton(tmp_path / "b.beton", image_size=12, exif="ignore").pil_image(3).size == (40, 30)


@pytest.mark.parametrize(("exif", "other"), [("transpose", "ignore"), ("ignore", "transpose")])
def test_a_beton_of_the_other_data_exif_is_refused(root, tmp_path, exif, other):
    splits = load_splits("image_folder", root=root, image_size=16, exif=exif)
    convert_splits("image_folder", splits, tmp_path / "a.beton")
    options = {"beton": tmp_path / "a.beton", "image_size": 16}
    assert len(load_splits("image_folder", **options, exif=exif).train) == len(splits.train)
    with pytest.raises(
        DataError, match=rf"a\.train\.beton holds images .*\(data\.exif={exif}\).* data\.exif={other}"
    ):
        load_splits("image_folder", **options, exif=other)


def test_a_beton_of_a_folder_without_the_entry_holds_images_as_stored(root, tmp_path):
    convert(open_train(root), tmp_path / "a.beton", name="image_folder/train")
    file = manifest_path(tmp_path / "a.beton")
    manifest = json.loads(file.read_text())
    del manifest["exif"]
    file.write_text(json.dumps(manifest))
    assert len(open_beton(tmp_path / "a.beton", image_size=12, exif="ignore")) == N
    with pytest.raises(DataError, match=r"data\.exif=ignore"):
        open_beton(tmp_path / "a.beton", image_size=12, exif="transpose")


def test_a_set_that_has_no_exif_data_opens_with_either_setting(tmp_path):
    splits = load_splits("synthetic", synthetic={"images": 20, "classes": 4})
    convert_splits("synthetic", splits, tmp_path / "a.beton")
    for exif in ("transpose", "ignore"):
        assert len(load_splits("synthetic", beton=tmp_path / "a.beton", exif=exif).train) == len(splits.train)


@pytest.mark.parametrize("size", [(70_000, 1), (1, 66_000), (65_501, 2)])
def test_an_image_with_too_long_a_side_is_named_with_what_to_do(root, tmp_path, size):
    path = root / "train/a/03.jpg"
    Image.new("RGB", size).save(path, "PNG")
    with pytest.raises(DataError, match=rf"03\.jpg is {size[0]}x{size[1]} pixels.*--max-size=65500"):
        stored(root, tmp_path)
    assert not (tmp_path / "a.beton").exists()
    assert max(stored(root, tmp_path, max_size=65_500)[1].size) == 65_500


def test_memory_that_encoding_lacks_names_the_image(root, tmp_path, monkeypatch):
    train = open_train(write_folder(tmp_path / "png"))

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(CorruptSample, match=r"image .*train/a/00\.png does not decode: it takes more memory"):
        convert(train, tmp_path / "a.beton")


# ---- which files belong together


def arrays(n=8):
    return ArraySource(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n) % 2, ["a", "b"])


def test_a_validation_file_of_an_earlier_conversion_is_not_used(tmp_path):
    out = tmp_path / "a.beton"
    convert_splits("cifar10", Splits(arrays(), arrays(6), arrays(4)), out)
    assert len(load_splits("cifar10", beton=out, validation_fraction=0).validation) == 6
    convert_splits("cifar10", Splits(arrays(), None, arrays(4)), out)
    assert split_file(out, "validation").exists()
    assert load_splits("cifar10", beton=out, validation_fraction=0).validation is None


def test_files_of_different_conversions_are_refused(tmp_path):
    out, other = tmp_path / "a.beton", tmp_path / "b.beton"
    convert_splits("cifar10", Splits(arrays(), arrays(6), arrays(4)), out)
    convert_splits("cifar10", Splits(arrays(), None, arrays(4)), other)
    for name in ("a.train.beton", "a.train.beton.json"):
        (tmp_path / name).write_bytes((tmp_path / name.replace("a.", "b.", 1)).read_bytes())
    with pytest.raises(DataError, match=r"a\.train\.beton and a\.test\.beton are of different conversions"):
        load_splits("cifar10", beton=out)


def test_files_of_0_1_which_name_no_others_go_by_what_exists(tmp_path):
    out = tmp_path / "a.beton"
    convert_splits("cifar10", Splits(arrays(), arrays(6), arrays(4)), out)
    for split in ("train", "validation", "test"):
        file = manifest_path(split_file(out, split))
        manifest = json.loads(file.read_text())
        del manifest["splits"]
        file.write_text(json.dumps(manifest))
    assert len(load_splits("cifar10", beton=out).validation) == 6


# ---- channels


def test_gray_images_can_be_read_as_rgb_and_rgb_images_not_as_gray(root, tmp_path):
    convert(open_train(root, channels=1), tmp_path / "gray.beton", raw_fraction=1.0)
    source = open_beton(tmp_path / "gray.beton", image_size=16, channels=3)
    assert source.channels == 3
    assert torch.equal(source.stack()[:, 1:2], open_train(root, channels=1).stack())
    convert(open_train(root), tmp_path / "rgb.beton")
    with pytest.raises(DataError, match=r"rgb\.beton holds RGB images.*data\.channels=1"):
        open_beton(tmp_path / "rgb.beton", image_size=16, channels=1)
