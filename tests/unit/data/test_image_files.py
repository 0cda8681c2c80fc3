"""Claims about single image files: what they become, the same everywhere, and which of them are refused, by name."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hpc_supcon.data import load_splits
from hpc_supcon.data.sources.image_file import ImageFormat, encoded_image, read_image
from hpc_supcon.data.sources.source import resize_and_crop
from hpc_supcon.data.sources.verify import verify
from hpc_supcon.errors import CorruptSample, DataError, HpcSupconError
from hpc_supcon.export import open_images

RGB = ImageFormat(3, 8, convert=True, resize=True, reference=Path("first"))
STORED = ImageFormat(3, 8, convert=True, resize=True, reference=Path("first"), exif="ignore")
ORIENTATION = 0x0112


def picture(width: int = 12, height: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def pillow(path: Path) -> Image.Image:
    """The image as Pillow alone reads it."""
    return Image.open(io.BytesIO(path.read_bytes()))


def exif(orientation: object) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def deep_png(path: Path, color_type: int, samples: int) -> Path:
    """A PNG of 16 bits per sample, which Pillow does not write in color. color_type: 2 RGB, 4 gray+alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(range(16 * samples))) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, color_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def deep_tiff(path: Path) -> Path:
    """An uncompressed RGB TIFF of 16 bits per sample."""
    tags = [
        (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
        (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head.ljust(122, b"\0") + struct.pack("<3H", 16, 16, 16) + bytes(range(24)))
    return path


def refused(path: Path, *parts: str, error: type[DataError] = DataError) -> None:
    """Every way to read the file raises this error in one line that names it."""
    for read in (read_image, encoded_image):
        with pytest.raises(error) as caught:
            read(path, RGB)
        assert "\n" not in str(caught.value)
        for part in (str(path), *parts):
            assert part in str(caught.value)


def decoded(path: Path, image_format: ImageFormat) -> Image.Image:
    """What another decoder makes of the bytes that it is given, which must not need to be turned."""
    data, size = encoded_image(path, image_format)
    assert not any(mark in data for mark in (b"Exif", b"eXIf", b"rientation"))
    image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "PPM"])
    assert image.size == size
    return image


def assert_same(a: Image.Image, b: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---- EXIF


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_exif_transpose_does_or_not_at_all(tmp_path, suffix, orientation):
    path = save(tmp_path / f"a.{suffix}", exif=exif(orientation))
    stored = pillow(path).convert("RGB")
    for image_format, expected in ((RGB, ImageOps.exif_transpose(pillow(path))), (STORED, stored)):
        assert_same(read_image(path, image_format), expected)
        assert_same(decoded(path, image_format), expected)
        assert read_image(path, image_format).size == expected.size


def test_a_tiff_is_turned_by_its_own_tag_once(tmp_path):
    tags = exif(6)
    path = save(tmp_path / "a.tif", picture(), exif=tags)
    assert_same(read_image(path, RGB), picture().transpose(Image.Transpose.ROTATE_270))
    assert_same(decoded(path, RGB), picture().transpose(Image.Transpose.ROTATE_270))


def test_an_orientation_in_xmp_alone_counts_as_exif_transpose_has_it(tmp_path):
    path = save(tmp_path / "a.jpg", xmp=b'<x tiff:Orientation="6"/>')
    assert read_image(path, RGB).size == ImageOps.exif_transpose(pillow(path)).size == (8, 12)
    assert decoded(path, RGB).size == (8, 12)


@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_count_as_none(tmp_path, suffix, data):
    path = save(tmp_path / f"a.{suffix}", exif=data)
    assert_same(read_image(path, RGB), pillow(path).convert("RGB"))
    assert_same(decoded(path, RGB), pillow(path).convert("RGB"))


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_counts_as_none(tmp_path, value):
    path = save(tmp_path / "a.jpg", exif=exif(value))
    assert read_image(path, RGB).size == decoded(path, RGB).size == (12, 8)


def test_plain_files_without_exif_data_are_passed_on_as_they_are(tmp_path):
    for path in (save(tmp_path / "a.jpg"), save(tmp_path / "b.png"), save(tmp_path / "c.png", picture(mode="L"))):
        assert encoded_image(path, RGB) == (path.read_bytes(), (12, 8))


def set_of(root: Path, images: dict[str, Image.Image], **options: object) -> Path:
    for split in ("train", "test"):
        for name, image in images.items():
            save(root / split / "a" / name, image, **options)
    return root


def train(root: Path, **options: object):
    return load_splits("image_folder", root=root, validation_fraction=0, **options).train


def test_the_size_of_a_set_is_that_of_the_turned_images(tmp_path):
    root = set_of(tmp_path, {"0.jpg": picture(12, 12)}, exif=exif(6))
    turned = np.asarray(ImageOps.exif_transpose(pillow(root / "train/a/0.jpg"))).transpose(2, 0, 1)
    assert torch.equal(train(root).read(0), torch.from_numpy(turned.copy()))
    assert torch.equal(train(root, exif="ignore").read(0), torch.from_numpy(np.rot90(turned, axes=(1, 2)).copy()))


def test_images_to_embed_are_turned_as_those_of_the_run(tmp_path):
    path = save(tmp_path / "a.png", picture(8, 8), exif=exif(3))
    as_stored, turned = (open_images([path], (3, 8, 8), (), exif=e).source.read(0) for e in ("ignore", "transpose"))
    assert torch.equal(turned, as_stored.flip(1, 2))


# ---- the form of a set


@pytest.mark.parametrize("damage", [b"", b"text", save])
def test_the_form_of_a_set_is_that_of_its_first_whole_image(tmp_path, damage):
    root = set_of(tmp_path, {"0.png": picture(9, 9), "1.png": picture(8, 8), "2.png": picture(8, 8)})
    first = root / "train/a/0.png"
    first.write_bytes(first.read_bytes()[:-40] if damage is save else damage)
    source = train(root)
    assert (source.channels, source.image_size) == (3, 8)
    assert torch.equal(source.read(1), source.read(2))
    with pytest.raises(CorruptSample, match=r"0\.png"):
        source.read(0)
    (problem,) = verify(root)["train"].problems
    assert str(first) in problem.message


def test_a_set_without_a_whole_image_names_the_first_one(tmp_path):
    root = set_of(tmp_path, {"0.png": picture(), "1.png": picture()})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(CorruptSample, match=r"train/a/0\.png does not decode: the file is empty"):
        train(root)


# ---- formats


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp", "gif", "tif", "TIFF"])
@pytest.mark.parametrize("pil_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_content_decides_the_format_whatever_the_suffix(tmp_path, suffix, pil_format):
    path = save(tmp_path / f"a.{suffix}", format=pil_format)
    assert_same(read_image(path, RGB), pillow(path).convert("RGB"))
    assert_same(decoded(path, RGB), pillow(path).convert("RGB"))


def test_the_first_frame_of_an_animation_is_the_image(tmp_path):
    frames = [picture(mode="P", seed=seed) for seed in range(3)]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert_same(read_image(path, RGB), frames[0].convert("RGB"))
        assert_same(decoded(path, RGB), frames[0].convert("RGB"))


@pytest.mark.parametrize("pil_format", ["TGA", "PCX", "SGI", "PPM", "ICO", "EPS"])
def test_another_format_is_refused_by_name(tmp_path, pil_format):
    path = save(tmp_path / "a.png", format=pil_format)
    refused(path, "not a JPEG, PNG, WebP, BMP, GIF or TIFF", error=CorruptSample)


@pytest.mark.parametrize(("color_type", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_is_refused_in_every_mode(tmp_path, color_type, samples):
    refused(deep_png(tmp_path / "a.png", color_type, samples), "more than 8 bits per channel")


def test_deep_files_of_other_formats_are_refused(tmp_path):
    refused(deep_tiff(tmp_path / "rgb.tif"), "more than 8 bits per channel")
    refused(save(tmp_path / "i.tif", Image.new("I;16", (8, 8))), "more than 8 bits per channel")
    refused(save(tmp_path / "f.tif", Image.new("F", (8, 8))), "more than 8 bits per channel")
    data = bytearray(save(tmp_path / "a.jpg").read_bytes())
    data[data.index(b"\xff\xc0") + 4] = 12
    (tmp_path / "a.jpg").write_bytes(data)
    refused(tmp_path / "a.jpg", "more than 8 bits per channel")


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_8_bit_mode_becomes_what_pillow_converts_it_to(tmp_path, mode, channels):
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    path = save(tmp_path / f"a.{suffix}", picture(mode=mode))
    image_format = ImageFormat(channels, 8, convert=True, resize=True, reference=path)
    expected = pillow(path).convert({1: "L", 3: "RGB"}[channels])
    assert_same(read_image(path, image_format), expected)
    assert_same(decoded(path, image_format).convert(expected.mode), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 10))])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_transparency_of_a_palette_is_dropped_and_its_colors_kept(tmp_path, mode, transparency):
    opaque = picture(mode="P")
    path = save(tmp_path / "a.png", opaque, transparency=transparency)
    image_format = ImageFormat(len(mode), 8, convert=True, resize=True, reference=path)
    assert_same(read_image(path, image_format), opaque.convert(mode))
    assert_same(decoded(path, image_format), opaque.convert(mode))


def test_a_transparent_color_is_dropped(tmp_path):
    for image, color in ((picture(), (1, 2, 3)), (picture(mode="L"), 7)):
        path = save(tmp_path / "a.png", image, transparency=color)
        assert_same(read_image(path, RGB), image.convert("RGB"))
        assert_same(decoded(path, RGB), image.convert("RGB"))


# ---- what Pillow raises, and what it says


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "more memory than there is"),
        (NotImplementedError("no such\ncompression"), "no such compression"),
        (Image.DecompressionBombError("bomb"), "bomb"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
@pytest.mark.parametrize("where", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_whatever_pillow_raises_names_the_image(tmp_path, monkeypatch, error, says, where):
    path = save(tmp_path / "a.gif")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load" if where.endswith("load") else where, fail)
    refused(path, "does not decode", says, error=CorruptSample)


def test_memory_that_resizing_lacks_names_the_image(tmp_path, monkeypatch):
    root = set_of(tmp_path, {"0.png": picture()})

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    source = train(root, image_size=4)
    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(CorruptSample, match=r"0\.png does not decode: it takes more memory"):
        source.read(0)


def test_a_file_that_is_gone_or_not_readable_is_named(tmp_path):
    refused(tmp_path / "gone.png", "No such file", error=CorruptSample)


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """The file with the last occurrence of these bytes replaced."""
    head, found, tail = path.read_bytes().rpartition(old)
    assert found
    path.write_bytes(head + new + tail)
    return path


def test_what_pillow_and_its_libraries_say_is_seen_by_nobody(tmp_path, capfd):
    """A warning about many pixels or odd EXIF data, a line of Pillow's log, a line that libtiff writes itself."""
    many = save(tmp_path / "many.png", Image.new("1", (10_000, 9_000)))
    tags = changed(save(tmp_path / "tags.tif", exif=exif(1)), b"\x12\x01\x03\0\x01", b"\x12\x01\x03\0\xff")
    samples = changed(save(tmp_path / "samples.tif"), b"\x15\x01\x03\0\1\0\0\0\3", b"\x15\x01\x03\0\1\0\0\0\x99")
    codes = save(tmp_path / "codes.tif", compression="tiff_lzw")
    data = codes.read_bytes()
    codes.write_bytes(data[:8] + bytes(b ^ 0xFF for b in data[8:40]) + data[40:])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for path in (many, tags, samples, codes):
            with suppress(CorruptSample):  # the tag is of no account
                read_image(path, RGB)
    assert not seen
    assert capfd.readouterr() == ("", "")


# ---- resizing


@pytest.mark.parametrize("size", [(480, 360), (360, 480), (64, 200), (33, 32), (500, 125), (7, 9)])
@pytest.mark.parametrize("side", [8, 32])
def test_an_image_is_resized_whole_and_its_center_cut_out(size, side):
    image = picture(*size)
    short = min(size)
    whole = image.resize((side * size[0] // short, side * size[1] // short), Image.Resampling.BILINEAR)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    assert_same(resize_and_crop(image, side), whole.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", [(600, 20), (20, 600), (1000, 3), (3, 1000), (9, 40)])
def test_of_a_long_image_the_same_square_is_cut_out_before_it_is_resized(size):
    image, short = picture(*size), min(size)
    whole = image.resize((16 * size[0] // short, 16 * size[1] // short), Image.Resampling.BILINEAR)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    difference = np.abs(np.asarray(resize_and_crop(image, 16)).astype(int) - expected)
    assert difference.max() <= 1


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_nothing_much_larger_than_the_result_is_made_of_a_line(monkeypatch, size):
    made = []
    resize = Image.Image.resize

    def record(self: Image.Image, *arguments: object, **options: object) -> Image.Image:
        made.append(resize(self, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", record)
    assert resize_and_crop(Image.new("L", size, 9), 32).size == (32, 32)
    assert [image.size for image in made] == [(32, 32)]


# ---- what is not a regular file, and names


def special_file(path: Path, kind: str) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_not_a_regular_file_is_never_opened(tmp_path, kind):
    """Opening a FIFO waits for somebody who writes into it, and reading /dev/zero never ends."""
    path = special_file(tmp_path / "a.jpg", kind)
    refused(path, "not an image file")
    with pytest.raises(DataError, match="not an image file"):
        open_images([path], (3, 8, 8), ())
    with pytest.raises(DataError, match="not an image file"):
        open_images([tmp_path], (3, 8, 8), ()).source.read(0)


def test_names_that_are_no_text_are_shown_with_escapes(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[2J.png"))
    path.write_bytes(b"")
    with pytest.raises(CorruptSample) as caught:
        read_image(path, RGB)
    assert "caf\\xe9\\n\\x1b[2J.png does not decode: the file is empty" in str(caught.value)
    str(caught.value).encode()


def test_every_named_error_has_one_printable_line():
    for error in HpcSupconError.__subclasses__():
        assert str(error("\udcff and \r\n a [b] \\n µ")) == "\\xff and \\r\\n a [b] \\n µ"
