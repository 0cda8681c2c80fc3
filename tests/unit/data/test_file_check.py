"""Which files another decoder is given in the place of Pillow: JPEGs of a regular structure, and some formats."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_supcon.data.loaders.file_check import is_regular
from tests.data.odd_images import WHOLE, encoded, jpeg, marker_in_scan, picture, png, with_stray_bytes

KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "gray": {"mode": "L"},
    "restart markers": {"restart_marker_blocks": 2},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_is_regular_as_a_whole_only(options):
    data = jpeg(20, 16, **options)
    assert is_regular(data)
    assert is_regular(data + b"what follows its end is of no account")
    assert not [n for n in range(len(data)) if is_regular(data[:n])]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_with_bytes_that_belong_to_no_segment_is_not_regular(options):
    data = jpeg(20, 16, **options)
    for marker in (0xDB, 0xC4, 0xDA):
        assert not is_regular(with_stray_bytes(data, marker))


def test_a_jpeg_with_a_marker_amid_its_scan_is_not_regular():
    assert not is_regular(marker_in_scan(jpeg(96, 72)))
    assert not is_regular(marker_in_scan(jpeg(96, 72, "L")))


def test_files_are_known_by_their_content():
    assert is_regular(png())
    assert is_regular(encoded(picture(), "PPM"))
    assert is_regular(encoded(picture(mode="L"), "PPM"))
    assert is_regular(encoded(picture(), "BMP"))
    assert not is_regular(encoded(picture(), "WEBP"))
    assert not is_regular(encoded(picture(), "TIFF"))
    assert not is_regular(b"")
    assert not is_regular(b"\xff\xd8\xff")


def test_damaged_bytes_never_raise():
    rng = np.random.default_rng(0)
    for image in WHOLE[:12]:
        data = np.frombuffer(image.make(), dtype=np.uint8)
        for _ in range(30):
            damaged = data.copy()
            damaged[rng.integers(2, len(data), 3)] = rng.integers(0, 256, 3)
            is_regular(damaged[: rng.integers(len(data))].tobytes())
