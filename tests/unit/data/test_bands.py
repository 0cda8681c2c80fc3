"""Images of any number of channels and of 16 bits: their files, conversions, resizing and statistics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hpc_supcon.data import ArraySource, load_splits, normalization_of
from hpc_supcon.data.sources.band_file import read_stored
from hpc_supcon.data.sources.bands import Bands
from hpc_supcon.data.sources.builtin import synthetic
from hpc_supcon.data.sources.image_file import ImageFormat
from hpc_supcon.data.sources.source import channel_statistics, fit_images, resize_and_crop
from hpc_supcon.errors import ConfigError, CorruptSample, DataError, MissingExtra

tifffile = pytest.importorskip("tifffile")


def levels(*shape: int, dtype: type = np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def form(channels: int, bits: int = 16, *, convert: bool = True) -> ImageFormat:
    return ImageFormat(channels, 8, convert=convert, resize=True, reference=Path("first"), bits=bits)


def pixels(path: Path, *arguments: int, **options: bool) -> np.ndarray:
    image = read_stored(path, form(*arguments, **options))
    if isinstance(image, Bands):
        return image.pixels
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


# ---- files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
@pytest.mark.parametrize("order", ["HWC", "CHW", "Fortran"])
@pytest.mark.parametrize("channels", [2, 5, 64])
def test_an_array_is_read_in_either_order_of_its_axes(tmp_path, dtype, order, channels):
    expected = levels(channels, 70, 66, dtype=np.dtype(dtype).newbyteorder("=").type)
    stored = expected.astype(dtype)
    stored = stored if order == "CHW" else stored.transpose(1, 2, 0)
    np.save(tmp_path / "a.npy", np.asfortranarray(stored) if order == "Fortran" else stored)
    found = pixels(tmp_path / "a.npy", channels, 8 * expected.itemsize)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_an_array_of_two_axes_is_gray_and_one_of_equal_axes_ends_in_channels(tmp_path):
    np.save(tmp_path / "a.npy", gray := levels(9, 7))
    np.testing.assert_array_equal(pixels(tmp_path / "a.npy", 1)[0], gray)
    np.save(tmp_path / "a.npy", cube := levels(5, 5, 5))
    np.testing.assert_array_equal(pixels(tmp_path / "a.npy", 5), cube.transpose(2, 0, 1))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(2, np.uint8), (3, np.uint16), (4, np.uint16), (5, np.uint8), (13, np.uint16)]
)
def test_a_tiff_of_many_samples_is_read_as_it_is_stored(tmp_path, planar, compression, channels, dtype):
    expected = levels(channels, 12, 10, dtype=dtype)
    stored = expected if planar == "separate" else expected.transpose(1, 2, 0)
    photometric = "rgb" if channels == 3 else "minisblack"
    options = {"photometric": photometric, "planarconfig": planar, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(stored), **options)
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif", channels, 8 * expected.itemsize), expected)


def test_no_sample_of_a_tiff_of_many_is_taken_for_gray(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        path = tmp_path / split / "a" / "0.tif"
        options = {"photometric": "minisblack", "planarconfig": "separate", "compression": "zlib"}
        tifffile.imwrite(path, levels(5, 8, 8, dtype=np.uint8), **options)
    with Image.open(path) as image:
        assert image.mode == "L"  # what Pillow makes of it
    assert load_splits("image_folder", root=tmp_path, validation_fraction=0).channels == 5
    splits = load_splits("image_folder", root=tmp_path, channels=3, validation_fraction=0)
    with pytest.raises(DataError, match=r"5 channels, but data\.channels=3"):
        splits.train.read(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [2, 3, 7])
def test_the_gray_pages_of_a_tiff_are_its_channels(tmp_path, monkeypatch, dtype, byteorder, channels):
    expected = levels(channels, 12, 10, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", expected, photometric="minisblack", byteorder=byteorder)
    monkeypatch.setitem(sys.modules, "tifffile", None)  # Pillow reads them
    bits = 8 * expected.itemsize
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif", channels, bits), expected)
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif", 1, bits)[0], expected[0])


def test_pages_of_an_unknown_meaning_are_refused_with_both_ways_to_read_them(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        tifffile.imwrite(tmp_path / split / "a" / "0.tif", levels(4, 8, 8), photometric="minisblack")
    with pytest.raises(DataError, match=r"0\.tif has 4 gray pages of one size: data\.channels=4 reads them"):
        load_splits("image_folder", root=tmp_path)
    assert load_splits("image_folder", root=tmp_path, channels=4, validation_fraction=0).channels == 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_that_tifffile_reads_is_turned_as_pillow_turns_one(tmp_path, orientation):
    stored = levels(12, 10, 3, dtype=np.uint8)
    tag = [(274, "H", 1, orientation, False)]
    tifffile.imwrite(tmp_path / "rgb.tif", stored, photometric="rgb", extratags=tag)
    tifffile.imwrite(
        tmp_path / "five.tif", np.dstack([stored, stored[..., :2]]), planarconfig="contig", extratags=tag
    )
    with Image.open(tmp_path / "rgb.tif") as image:
        upright = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(tmp_path / "five.tif", 5, 8)[:3], upright)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_gray_png_of_16_bits_is_read_exactly_and_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gray := levels(12, 10)).save(tmp_path / "a.png", exif=exif)
    expected = gray if orientation == 1 else np.rot90(gray, -1)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", 1), expected[None])
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", 3), np.stack([expected] * 3))


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_transparency_is_a_channel_where_that_many_are_asked_for(tmp_path, mode, channels):
    stored = levels(12, 10, channels, dtype=np.uint8)
    Image.fromarray(stored, mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", channels, 8), stored.transpose(2, 0, 1))


def test_rgb_of_16_bits_becomes_gray_by_its_luminance(tmp_path):
    np.save(tmp_path / "a.npy", rgb := levels(12, 10, 3))
    expected = rgb @ np.array([0.2989, 0.587, 0.114])
    assert np.abs(pixels(tmp_path / "a.npy", 1)[0] - expected).max() <= 0.51


def test_an_array_of_8_bit_rgb_is_read_as_the_same_png(tmp_path):
    np.save(tmp_path / "a.npy", rgb := levels(12, 10, 3, dtype=np.uint8))
    Image.fromarray(rgb).save(tmp_path / "a.png")
    for channels in (1, 3):
        found = [pixels(tmp_path / name, channels, 8) for name in ("a.npy", "a.png")]
        np.testing.assert_array_equal(*found)


# ---- what is refused


def save_wrong(folder: Path, what: str) -> Path:
    path = folder / "wrong.npy"
    if what == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif what == "cut":
        np.save(path, levels(5, 12, 10))
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "huge":
        header = str({"descr": "|u1", "fortran_order": False, "shape": (5, 10**9, 10**9)}).ljust(117) + "\n"
        path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + header.encode())
    elif what == "cut tiff":
        path = folder / "wrong.tif"
        tifffile.imwrite(path, levels(12, 10, 5), planarconfig="contig")
        path.write_bytes(path.read_bytes()[:-400])
    elif what == "no tiff":
        path = folder / "wrong.tif"
        path.write_bytes(b"II*\0" + bytes(40))
    elif what == "float tiff":
        path = folder / "wrong.tif"
        tifffile.imwrite(path, np.zeros((12, 10, 5), np.float32), planarconfig="contig")
    elif what == "deep color":
        from tests.data.odd_images import png_of_16_bits

        path = folder / "wrong.png"
        path.write_bytes(png_of_16_bits(2, 3))
    else:
        arrays = {
            "float": np.zeros((5, 8, 8)),
            "one axis": levels(5),
            "many": levels(70, 80, 90),
            "four": levels(4, 8, 8),
        }
        np.save(path, arrays[what])
    return path


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("pickle", CorruptSample, "does not decode"),
        ("cut", CorruptSample, "does not decode"),
        ("huge", CorruptSample, "does not decode"),
        ("cut tiff", CorruptSample, "does not decode"),
        ("no tiff", CorruptSample, "does not decode"),
        ("float tiff", DataError, "levels of type float32: save it as uint8 or uint16"),
        ("deep color", DataError, "more than 8 bits per channel, which Pillow does not read in color"),
        ("float", DataError, "an array of float64: save it as uint8 or uint16"),
        ("one axis", DataError, r"of shape \[5\]: expected \[H, W\]"),
        ("many", DataError, r"of shape \[70, 80, 90\]: expected \[H, W\]"),
        ("four", DataError, "4 channels, but data.channels=5"),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path, what, error, says):
    path = save_wrong(tmp_path, what)
    with pytest.raises(error, match=says) as caught:
        pixels(path, 5)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tiff_that_needs_tifffile_says_how_to_install_it(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", levels(12, 10, 5), planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingExtra, match=r"a\.tif: .*pip install 'hpc-supcon\[tiff\]'"):
        pixels(tmp_path / "a.tif", 5)


def write_set(root: Path, channels: int, dtype: type = np.uint16, size: int = 12) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                np.save(root / split / name / f"{i}.npy", levels(channels, size, size, dtype=dtype, seed=i))
    return root


@pytest.mark.parametrize("given", [None, 5])
@pytest.mark.parametrize(("odd", "says"), [((4, np.uint16), "4"), ((5, np.uint8), "mixed depths")])
def test_an_image_of_another_form_than_the_first_is_named(tmp_path, given, odd, says):
    root = write_set(tmp_path, 5)
    np.save(path := root / "train" / "b" / "3.npy", levels(odd[0], 12, 12, dtype=odd[1]))
    splits = load_splits("image_folder", root=root, channels=given, validation_fraction=0)
    with pytest.raises(DataError, match=says) as caught:
        splits.train.stack()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_five_channels_become_no_other_number(tmp_path, channels):
    with pytest.raises(DataError, match=rf"5 channels, but data\.channels={channels}: only gray and RGB"):
        load_splits("image_folder", root=write_set(tmp_path, 5), channels=channels)
    with pytest.raises(DataError, match=rf"5 channels, but data\.channels={channels}"):
        fit_images(torch.zeros(1, 5, 8, 8, dtype=torch.uint8), image_size=None, channels=channels)


# ---- resizing and cropping


@pytest.mark.parametrize(("size", "target"), [((40, 30), (16, 12)), ((17, 23), (40, 31)), ((9, 9), (9, 9))])
def test_bands_are_resized_as_torch_interpolates(size, target):
    image = Bands(levels(5, *size))
    found = image.resize(target[::-1], Image.Resampling.BILINEAR).pixels
    expected = F.interpolate(torch.from_numpy(image.pixels)[None].float(), target, mode="bilinear", antialias=True)
    assert found.dtype == np.uint16
    assert np.abs(found - expected[0].numpy()).max() <= 0.6


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (9, 60), (1, 200)])
def test_bands_are_cropped_to_the_center_as_pillow_crops_each_of_them(size):
    image = Bands(levels(3, *size, dtype=np.uint8))
    found = resize_and_crop(image, 16).pixels
    bands = [resize_and_crop(Image.fromarray(band), 16) for band in image.pixels]
    assert found.shape == (3, 16, 16)
    assert np.abs(found.astype(int) - np.stack([np.asarray(band) for band in bands])).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_rgb_of_16_bits_are_converted_and_resized_as_floats_are(channels):
    images = torch.from_numpy(levels(4, 4 - channels, 20, 20))
    found = fit_images(images, image_size=8, channels=channels)
    x = images.double()
    x = (
        x.expand(-1, 3, -1, -1)
        if channels == 3
        else torch.einsum("nchw,c->nhw", x, torch.tensor([0.2989, 0.587, 0.114]).double())[:, None]
    )
    expected = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    assert found.dtype == torch.uint16
    assert (found.double() - expected).abs().max() <= 1.1  # rounded twice


# ---- statistics and the synthetic set


@pytest.mark.parametrize("highest", [4095, 65535])
def test_statistics_of_16_bits_are_those_of_numpy_in_float64(highest):
    images = np.random.default_rng(0).integers(0, highest, (50, 6, 9, 9), dtype=np.uint16, endpoint=True)
    images[:, 4] = 1234
    mean, std = channel_statistics(torch.from_numpy(images))
    x = images.astype(np.float64) / 65535
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-6)
    expected = x.std((0, 2, 3))
    expected[4] = 1
    np.testing.assert_allclose(std, expected, rtol=1e-6)


def test_the_normalization_says_the_bits_of_deep_images_alone():
    for dtype, bits in ((torch.uint8, None), (torch.uint16, 16)):
        source = ArraySource(torch.zeros(2, 4, 3, 3).to(dtype), torch.zeros(2, dtype=torch.int64), "a")
        assert normalization_of(source).get("bits") == bits


def test_synthetic_images_of_16_bits_are_those_of_8_in_finer_levels():
    coarse, fine = (synthetic(images=20, classes=2, channels=5, image_size=9, bits=bits)[0] for bits in (8, 16))
    assert fine.dtype == torch.uint16
    assert torch.equal(coarse.labels, fine.labels)
    assert (fine.stack().double() / 257 - coarse.stack().double()).abs().max() <= 0.501
    assert len(fine.stack().unique()) > 256


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"channels": 65}, {"bits": 12}])
def test_synthetic_images_of_no_such_form_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"channels 1\.\.64 and bits 8 or 16"):
        synthetic(**wrong)
