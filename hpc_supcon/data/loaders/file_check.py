"""Which image files another decoder may be given in the place of Pillow, which decides what an image is.

A decoder that refuses a file is no harm: Pillow is then asked. One that accepts what Pillow refuses would train on
images that the other loaders call corrupt. libjpeg-turbo and nvJPEG read JPEGs of a regular structure as Pillow does,
and OpenCV reads PNG, BMP and PPM so; for WebP and TIFF they were seen to accept damaged files that Pillow refuses.
"""

from __future__ import annotations

from ..sources.jpeg import end_of

_LENIENT_NOWHERE = (b"\x89PNG\r\n\x1a\n", b"BM", b"P5", b"P6")
_JPEG = b"\xff\xd8\xff"


def is_regular(data: bytes) -> bool:
    """Whether every decoder that accepts this file reads what Pillow reads from it. Decodes nothing: microseconds."""
    return end_of(data) is not None if data.startswith(_JPEG) else data.startswith(_LENIENT_NOWHERE)
