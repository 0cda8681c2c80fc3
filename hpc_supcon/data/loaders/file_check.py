"""Which image files another decoder may be given in the place of Pillow, which decides what an image is.

A decoder that refuses a file is no harm: Pillow is then asked. One that accepts what Pillow refuses would train on
images that the other loaders call corrupt. libjpeg-turbo and nvJPEG read JPEGs of a regular structure as Pillow does,
and OpenCV reads PNG, BMP and PPM so; for WebP and TIFF they were seen to accept damaged files that Pillow refuses.
"""

from __future__ import annotations

import re

_LENIENT_NOWHERE = (b"\x89PNG\r\n\x1a\n", b"BM", b"P5", b"P6")
_JPEG = b"\xff\xd8\xff"
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""What ends entropy-coded data: FF 00 is a byte FF in them, and FF D0 to FF D7 are restart markers."""
_START_OF_SCAN, _END = 0xDA, 0xD9
_SEGMENTS = range(0xC0, 0xFF)
_WITHOUT_LENGTH = range(0xD0, 0xD9)


def is_regular(data: bytes) -> bool:
    """Whether every decoder that accepts this file reads what Pillow reads from it. Decodes nothing: microseconds."""
    return is_regular_jpeg(data) if data.startswith(_JPEG) else data.startswith(_LENIENT_NOWHERE)


def is_regular_jpeg(data: bytes) -> bool:
    """Whether a JPEG is segments without a gap, with a scan and an end; what follows the end is of no account.

    Not so: files that end early, have bytes that belong to no segment, or a marker amid entropy-coded data.
    """
    position, scans = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker not in _SEGMENTS or marker in _WITHOUT_LENGTH:
            return False
        if marker == _END:
            return scans > 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            scans += 1
            found = _MARKER_IN_SCAN.search(data, position)
            if found is None:
                return False
            position = found.start()
    return scans > 0 and data[position : position + 2] == b"\xff\xd9"
