"""Thumbnails: every tile is its image, and ten thousand natural images fit into a page."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_supcon.pages.thumbnails import JSON, MAX_BYTES, WEBP, read_thumbnails, write_thumbnails


def tiles(folder):
    """[n, H, W, 3] of the pictures that were written, cut by what thumbnails.json says."""
    found = read_thumbnails(folder)
    sheet = np.asarray(Image.open(io.BytesIO(found.webp)).convert("RGB"))
    (w, h), columns = found.tile, found.columns
    places = [divmod(i, columns) for i in range(len(found.index))]
    return np.stack([sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] for r, c in places]), found


@pytest.mark.parametrize(
    ("channels", "height", "width", "n"), [(1, 8, 8, 11), (3, 32, 32, 7), (3, 20, 32, 5), (3, 64, 96, 6)]
)
def test_every_tile_shows_its_image(tmp_path, channels, height, width, n):
    rng = np.random.default_rng(n)
    colors = rng.integers(40, 216, size=(n, channels), dtype=np.uint8)
    images = np.broadcast_to(colors[:, :, None, None], (n, channels, height, width)).copy()
    index = rng.permutation(1000)[:n]
    write_thumbnails(tmp_path, images, index)
    cut, found = tiles(tmp_path)
    assert found.index.tolist() == index.tolist()
    assert max(found.tile) <= 32
    assert found.tile[0] / found.tile[1] == pytest.approx(width / height, rel=0.05)
    h, w = cut.shape[1:3]
    middle = cut[:, h // 4 : -h // 4, w // 4 : -w // 4].mean(axis=(1, 2))  # lossy codecs blend colors at edges
    assert np.abs(middle - np.broadcast_to(colors, (n, 3))).max() < 20


def test_one_image_and_a_thin_one(tmp_path):
    write_thumbnails(tmp_path, np.zeros((1, 3, 4, 400), np.uint8), [5])
    assert read_thumbnails(tmp_path).tile == (32, 1)


def noise(n):
    """Images that no codec makes small: more than natural ones take."""
    return np.random.default_rng(0).integers(0, 256, size=(n, 3, 32, 32), dtype=np.uint8)


def test_the_quality_follows_the_size(tmp_path, monkeypatch):
    from hpc_supcon.pages import thumbnails

    write_thumbnails(tmp_path, noise(100), range(100))
    best = (tmp_path / WEBP).stat().st_size
    monkeypatch.setattr(thumbnails, "MAX_BYTES", best // 2)
    write_thumbnails(tmp_path, noise(100), range(100))
    assert (tmp_path / WEBP).stat().st_size <= best // 2


@pytest.mark.parametrize(
    ("images", "index"),
    [
        (np.zeros((2, 4, 8, 8), np.uint8), [0, 1]),
        (np.zeros((2, 3, 8, 8), np.float32), [0, 1]),
        (np.zeros((2, 3, 8, 8), np.uint8), [0]),
        (np.zeros((0, 3, 8, 8), np.uint8), []),
    ],
    ids=["four channels", "floats", "an index too few", "no image"],
)
def test_what_is_no_images_is_refused(tmp_path, images, index):
    with pytest.raises(ValueError, match="thumbnails"):
        write_thumbnails(tmp_path, images, index)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / WEBP).write_bytes((f / WEBP).read_bytes()[:20]),
        lambda f: (f / WEBP).write_bytes(b"<svg onload=alert(1)>"),
        lambda f: (f / JSON).write_text("{"),
        lambda f: (f / JSON).write_text('{"tile": [8, 8], "columns": 0, "index": [0]}'),
        lambda f: (f / JSON).write_text('{"tile": [16, 8], "columns": 4, "index": [0]}'),
        lambda f: (f / JSON).write_text('{"tile": "x"}'),
    ],
)
def test_damaged_thumbnails_are_named(tmp_path, change):
    write_thumbnails(tmp_path, np.zeros((9, 3, 8, 8), np.uint8), range(9))
    change(tmp_path)
    with pytest.raises((ValueError, OSError)):
        read_thumbnails(tmp_path)


@pytest.mark.real_data
@pytest.mark.skipif("HPC_SUPCON_TEST_DATA" not in os.environ, reason="needs HPC_SUPCON_TEST_DATA")
def test_ten_thousand_natural_images_fit_into_a_page(tmp_path):
    paths = sorted((Path(os.environ["HPC_SUPCON_TEST_DATA"]) / "cifar10/test").rglob("*.*"))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])
    assert len(images) == 10_000
    write_thumbnails(tmp_path, images, range(10_000))
    assert (tmp_path / WEBP).stat().st_size <= MAX_BYTES
    cut, _ = tiles(tmp_path)
    error = np.square(cut[:500].transpose(0, 3, 1, 2) / 255.0 - images[:500] / 255.0).mean()
    assert -10 * np.log10(error) > 22, "signal to noise in dB"
