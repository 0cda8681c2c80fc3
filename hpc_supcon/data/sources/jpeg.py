"""The structure of JPEG files: which of them every decoder takes, and their EXIF data.

libjpeg, which Pillow uses, reads on with a warning where a file has bytes that belong to nothing, ends early, or has
wrong entropy-coded data; FFCV and DALI take each of these warnings for an error.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_ulong, c_void_p
from functools import lru_cache

START = b"\xff\xd8"
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITH_LENGTH = frozenset(range(0xC0, 0xFF)) - frozenset(range(0xD0, 0xDA))
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""What ends entropy-coded data: FF 00 is a byte FF in them, FF D0 to FF D7 are restart markers."""


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, byte after the last one) of all segments up to the end of the image, scans with their
    data; stops early where bytes belong to no segment, or the file ends."""
    position = len(START)
    while data[position : position + 1] == b"\xff" and position + 2 <= len(data):
        marker, begin = data[position + 1], position
        if marker == _END:
            yield marker, begin, begin + 2
            return
        if marker not in _WITH_LENGTH:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _SCAN:
            found = _AFTER_SCAN.search(data, position)
            if found is None:
                return
            position = found.start()
        yield marker, begin, position


def end_of(data: bytes) -> int | None:
    """The byte after the end of a JPEG that is segments without a gap, with a scan and an end; None for any other:
    one that ends early, has bytes that belong to no segment, or a marker amid entropy-coded data."""
    scans = 0
    for marker, _, end in _segments(data) if data.startswith(START) else ():
        scans += marker == _SCAN
        if marker == _END:
            return end if scans else None
    return None


def whole_jpeg(data: bytes) -> bytes | None:
    """The JPEG at the start of `data` without what follows its end, if a strict decoder takes it; else None.

    Where libjpeg-turbo's library is installed, as FFCV needs it, it is decoded: the structure does not show wrong
    entropy-coded data.
    """
    end = end_of(data)
    return data[:end] if end is not None and _decodes_strictly(data[:end]) else None


def without_exif(data: bytes) -> bytes | None:
    """The JPEG without its APP1 segments (EXIF and XMP), for decoders that turn images by them; its pixels as before.

    None where bytes before the first scan belong to no segment.
    """
    kept: list[bytes] = []
    begin = 0
    for marker, first, end in _segments(data):
        if marker == _SCAN:
            return b"".join((*kept, data[begin:])) if kept else data
        if marker == _APP1:
            kept.append(data[begin:first])
            begin = end
    return None


def bits_per_channel(data: bytes) -> int | None:
    """As the header says; None where there is none."""
    for marker, first, _ in _segments(data) if data.startswith(START) else ():
        if marker in _FRAMES and first + 4 < len(data):
            return data[first + 4]
    return None


@lru_cache(maxsize=1)
def _turbojpeg() -> ctypes.CDLL | None:
    """libjpeg-turbo's library, or None where it is not installed."""
    try:
        library = ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        return None
    library.tjInitDecompress.restype = c_void_p
    library.tjDestroy.argtypes = [c_void_p]
    library.tjDecompressHeader3.argtypes = [c_void_p, c_char_p, c_ulong, *[POINTER(c_int)] * 4]
    library.tjDecompress2.argtypes = [c_void_p, c_char_p, c_ulong, c_void_p, *[c_int] * 5]
    return library


_CMYK_SPACES = (3, 4)
"""TJCS_CMYK and TJCS_YCCK, the spaces of four channels, which are decoded to _CMYK alone."""
_GRAY, _CMYK = 6, 11
"""TJPF_GRAY, TJPF_CMYK."""


def _decodes_strictly(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes the file without a warning; True where it is not installed.

    All entropy-coded data are read; the pixels are of an eighth of the size, which costs little.
    """
    library = _turbojpeg()
    if library is None:
        return True
    handle = library.tjInitDecompress()
    width, height, subsampling, space = c_int(), c_int(), c_int(), c_int()
    try:
        header = byref(width), byref(height), byref(subsampling), byref(space)
        if library.tjDecompressHeader3(handle, data, len(data), *header):
            return False
        w, h = (-(-side.value // 8) for side in (width, height))
        pixel_format, bytes_per_pixel = (_CMYK, 4) if space.value in _CMYK_SPACES else (_GRAY, 1)
        pixels = ctypes.create_string_buffer(w * h * bytes_per_pixel)
        return not library.tjDecompress2(handle, data, len(data), pixels, w, 0, h, pixel_format, 0)
    finally:
        library.tjDestroy(handle)
