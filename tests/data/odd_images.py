"""Image files as people have them, made from nothing but code: of every format and mode, old, damaged, hostile.

`ODD_IMAGES` is the table: each file's name, its bytes, and what every loader has to do with it.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Expectation = Literal["decodes", "damaged", "refused"]
"""decodes: to what Pillow makes of it. damaged: named under on_corrupt=fail, replaced by another image under
replace. refused: named under both, because no other image may stand for one that is whole."""


@dataclass(frozen=True)
class OddImage:
    """A file, and what becomes of it in a set of RGB images (data.channels=3) with data.image_size set."""

    name: str
    make: Callable[[], bytes] | None
    """The bytes of the file; None: a FIFO."""
    expectation: Expectation
    says: str = ""
    """Part of the message that names the file."""

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        if self.make is None:
            os.mkfifo(path)
        else:
            path.write_bytes(self.make())
        return path


def picture(width: int = 48, height: int = 36, mode: str = "RGB", *, seed: int = 0) -> Image.Image:
    """A smooth random image, for which decoders and resampling filters agree."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def jpeg(width: int = 48, height: int = 36, mode: str = "RGB", **options: object) -> bytes:
    return encoded(picture(width, height, mode), "JPEG", **{"quality": 95, **options})


def png(mode: str = "RGB", width: int = 48, height: int = 36, **options: object) -> bytes:
    return encoded(picture(width, height, mode), "PNG", **options)


def turned(orientation: int) -> bytes:
    """A JPEG whose EXIF data say how to turn it, as phones write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif)


def with_stray_bytes(data: bytes, marker: int, stray: bytes = b"\x00\x17\x2a") -> bytes:
    """A JPEG with bytes that belong to nothing before the first marker FF `marker`, as some cameras write it."""
    position = data.index(bytes((0xFF, marker)))
    return data[:position] + stray + data[position:]


def cut(data: bytes, share: float) -> bytes:
    """The first part of a file."""
    return data[: int(len(data) * share)]


def entropy_flipped(data: bytes) -> bytes:
    """A baseline JPEG with wrong bytes amid its entropy-coded data; no marker is made or destroyed."""
    scan = data.index(b"\xff\xda") + 14
    middle = scan + (len(data) - scan) // 2
    changed = bytes(b if b in (0x00, 0xFF) else b ^ 0x15 for b in data[middle : middle + 8])
    return data[:middle] + changed.replace(b"\xff", b"\xfe") + data[middle + 8 :]


def marker_in_scan(data: bytes) -> bytes:
    """A JPEG with a beginning of tables amid its entropy-coded data; decoders differ in how far they read on."""
    scan = data.index(b"\xff\xda") + 14
    middle = scan + (len(data) - scan) * 3 // 4
    return data[:middle] + b"\xff\xc4" + data[middle + 2 :]


def wrong_byte(data: bytes, share: float) -> bytes:
    """The file with one byte changed."""
    at = int(len(data) * share)
    return data[:at] + bytes([data[at] ^ 0x95]) + data[at + 1 :]


def png_of_16_bits(color_type: int, samples: int, side: int = 16) -> bytes:
    """A PNG with 16 bits per sample, which Pillow cannot write in color. color_type: 0 gray, 2 RGB, 6 RGBA."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1 << 16, (side, side * samples), dtype=np.uint16).astype(">u2")
    return _png(side, side, 16, color_type, b"".join(b"\0" + row.tobytes() for row in rows))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header names a huge size."""
    return _png(width, height, 8, 2, bytes(100))


def _png(width: int, height: int, bits: int, color_type: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A JPEG whose frame header names another size than its data have."""
    data = jpeg()
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def with_bad_checksum() -> bytes:
    """A PNG whose image data differ from their checksum."""
    data = bytearray(png())
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


def transparent_palette() -> bytes:
    return encoded(picture(mode="P"), "PNG", transparency=3)


def transparent_color() -> bytes:
    """An RGB image one of whose colors is transparent."""
    image = picture()
    return encoded(image, "PNG", transparency=image.getpixel((5, 5)))


def translucent(mode: str) -> Image.Image:
    """With a gradient from transparent to opaque."""
    image = picture(mode=mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def animated_gif() -> bytes:
    frames = [picture(mode="P", seed=seed) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _odd(
    expectation: Expectation, says: str, files: Iterable[tuple[str, Callable[[], bytes] | None]]
) -> list[OddImage]:
    return [OddImage(name, make, expectation, says) for name, make in files]


WHOLE = _odd(
    "decodes",
    "",
    [
        ("baseline.jpg", jpeg),
        ("upper-case.JPEG", jpeg),
        ("progressive.jpg", partial(jpeg, progressive=True)),
        ("subsampled.jpg", partial(jpeg, subsampling=2, width=33, height=47)),
        ("restart-markers.jpg", partial(jpeg, restart_marker_blocks=2)),
        ("grey.jpg", partial(jpeg, mode="L")),
        ("cmyk.jpg", partial(jpeg, mode="CMYK")),
        *((f"exif-{k}.jpg", partial(turned, k)) for k in range(1, 9)),
        ("exif-of-a-png.png", lambda: png(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0")),
        ("stray-before-a-table.jpg", lambda: with_stray_bytes(jpeg(), 0xC4)),
        ("stray-before-the-frame.jpg", lambda: with_stray_bytes(jpeg(), 0xC0)),
        ("stray-before-the-end.jpg", lambda: with_stray_bytes(jpeg(), 0xD9)),
        ("trailing-garbage.jpg", lambda: jpeg() + b"garbage " * 30),
        ("trailing-zeros.jpg", lambda: jpeg() + bytes(500)),
        ("two-in-one.jpg", lambda: jpeg() + encoded(picture(seed=9), "JPEG")),
        ("flipped.jpg", lambda: entropy_flipped(jpeg(96, 72))),
        # Pillow fills with gray what is missing before the end of a JPEG, and it alone decides
        ("cut-and-closed.jpg", lambda: cut(jpeg(200, 150), 0.5) + b"\xff\xd9"),
        ("taller-than-its-data.jpg", lambda: jpeg_that_claims(48, 200)),
        ("rgb-not-ycc.jpg", partial(jpeg, keep_rgb=True)),
        ("grey.png", partial(png, "L")),
        ("rgb.png", png),
        ("rgba.png", lambda: encoded(translucent("RGB"), "PNG")),
        ("grey-alpha.png", lambda: encoded(translucent("L"), "PNG")),
        ("palette.png", partial(png, "P")),
        ("palette-transparent.png", transparent_palette),
        ("color-transparent.png", transparent_color),
        ("one-bit.png", partial(png, "1")),
        ("trailing-garbage.png", lambda: png() + b"garbage"),
        ("lossless.webp", lambda: encoded(picture(), "WEBP", lossless=True)),
        ("alpha.webp", lambda: encoded(translucent("RGB"), "WEBP", lossless=True)),
        ("rgb.bmp", lambda: encoded(picture(), "BMP")),
        ("palette.bmp", lambda: encoded(picture(mode="P"), "BMP")),
        ("animated.gif", animated_gif),
        ("rgb.tif", lambda: encoded(picture(), "TIFF")),
        ("compressed.tiff", lambda: encoded(picture(), "TIFF", compression="tiff_lzw")),
        ("a-png.jpg", png),
        ("a-jpeg.png", jpeg),
        ("a-gif.jpg", animated_gif),
        ("one-pixel.png", partial(png, "RGB", 1, 1)),
        ("one-pixel.jpg", partial(jpeg, 1, 1)),
        ("wide.jpg", partial(jpeg, 200, 20)),
        ("tall.png", partial(png, "RGB", 20, 200)),
        ("line.png", partial(png, "L", 60_000, 1)),
        ("not-square.png", partial(png, "RGB", 480, 360)),
    ],
)

DAMAGED = _odd(
    "damaged",
    "",
    [
        ("empty.jpg", bytes),
        ("header-alone.jpg", lambda: jpeg()[:20]),
        ("no-scan.jpg", lambda: (data := jpeg())[: data.index(b"\xff\xda")]),
        *((f"cut-at-{share}.jpg", lambda share=share: cut(jpeg(200, 150), share)) for share in (0.3, 0.6, 0.95)),
        ("cut-progressive.jpg", lambda: cut(jpeg(200, 150, progressive=True), 0.7)),
        ("cut-grey.jpg", lambda: cut(jpeg(200, 150, "L"), 0.8)),
        ("text.jpg", lambda: b"this is not an image\n" * 50),
        ("text.png", lambda: b"this is not an image\n" * 50),
        ("cut.png", lambda: cut(png(), 0.6)),
        ("checksum.png", with_bad_checksum),
        ("cut.webp", lambda: cut(encoded(picture(), "WEBP"), 0.6)),
        ("cut.bmp", lambda: cut(encoded(picture(), "BMP"), 0.6)),
        ("cut.gif", lambda: cut(encoded(picture(mode="P"), "GIF"), 0.6)),
        # what other decoders were seen to accept
        ("marker-in-scan.jpg", lambda: marker_in_scan(jpeg(96, 72))),
        ("wrong-byte.tif", lambda: wrong_byte(encoded(picture(), "TIFF", compression="tiff_lzw"), 0.4)),
        ("cut.tif", lambda: cut(encoded(picture(), "TIFF", compression="tiff_lzw"), 0.6)),
        ("huge.png", lambda: png_that_claims(100_000, 100_000)),
        ("huge.jpg", lambda: jpeg_that_claims(60_000, 60_000)),
    ],
)

REFUSED = _odd(
    "refused",
    "8 bits",
    [
        ("deep-grey.png", lambda: png_of_16_bits(0, 1)),
        ("deep-rgb.png", lambda: png_of_16_bits(2, 3)),
        ("deep-rgba.png", lambda: png_of_16_bits(6, 4)),
    ],
) + _odd("refused", "not an image file", [("fifo.jpg", None)])

ODD_IMAGES = [*WHOLE, *DAMAGED, *REFUSED]
