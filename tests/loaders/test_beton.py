"""Claims about .beton files: what is written, and that a file which differs from it is never read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

from hpc_supcon.data import ArraySource, load_splits
from hpc_supcon.data.sources.beton import manifest_path, open_beton
from hpc_supcon.data.sources.convert import convert
from hpc_supcon.errors import ConfigError, CorruptSample, DataError

from .contract import N, open_train, save, write_folder


@pytest.fixture
def arrays() -> ArraySource:
    return load_splits(
        "synthetic", synthetic={"images": 70, "classes": 5}, validation_fraction=0, image_size=12
    ).train


@pytest.fixture
def beton(arrays, tmp_path):
    path = tmp_path / "train.beton"
    convert(arrays, path, name="synthetic/train", raw_fraction=0.5)
    return path


def test_pixels_labels_and_classes_are_read_back(arrays, tmp_path):
    calls = []
    manifest = convert(arrays, tmp_path / "a.beton", raw_fraction=1.0, progress=lambda *done: calls.append(done))
    source = open_beton(tmp_path / "a.beton")
    assert torch.equal(source.stack(), arrays.stack())
    assert torch.equal(source.labels, arrays.labels)
    assert (source.classes, source.channels, source.image_size) == (arrays.classes, 3, 12)
    assert torch.equal(source.subset([5, 3]).read(1), arrays.read(3))
    assert calls == [(64, 70), (70, 70)]
    assert manifest == json.loads(manifest_path(tmp_path / "a.beton").read_text())
    assert manifest["labels"] == arrays.labels.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]


def test_gray_images_are_read_back_gray(tmp_path):
    digits = load_splits("digits", validation_fraction=0).test
    for fraction in (0.0, 1.0):
        convert(digits, tmp_path / "a.beton", raw_fraction=fraction)
        source = open_beton(tmp_path / "a.beton")
        assert source.channels == 1
        assert (source.stack().float() - digits.stack().float()).abs().mean() < (8 if fraction == 0 else 1e-9)


def test_raw_fraction_is_the_share_of_images_stored_exactly(arrays, beton):
    source = open_beton(beton)
    exact = (source.stack() == arrays.stack()).flatten(1).all(dim=1)
    assert exact.tolist() == (source.columns["mode"] == 1).tolist()
    assert 20 < exact.sum() < 50


def test_jpeg_files_are_copied_unless_quality_or_size_is_changed(tmp_path):
    train = open_train(write_folder(tmp_path, suffix="jpg", quality=60))
    original = train.paths[3].read_bytes()

    def stored(**options):
        convert(train, tmp_path / "a.beton", **options)
        source = open_beton(tmp_path / "a.beton", image_size=12)
        ptr, size = source.columns["ptr"][3], source.columns["size"][3]
        return source.bytes[ptr : ptr + size].tobytes(), source.pil_image(3).size

    assert stored() == (original, (80, 64))
    assert stored(max_size=80) == (original, (80, 64))
    assert len(stored(jpeg_quality=20)[0]) < len(original)
    assert stored(max_size=40)[1] == (40, 32)


def test_images_of_mixed_sizes_need_a_size_to_be_opened(tmp_path):
    root = write_folder(tmp_path)
    save(root / "train" / "a" / "00.png", size=(30, 50))
    assert convert(open_train(root), tmp_path / "a.beton")["image_size"] == "mixed"
    with pytest.raises(DataError, match=r"mixed sizes: set data\.image_size"):
        open_beton(tmp_path / "a.beton")
    assert open_beton(tmp_path / "a.beton", image_size=7).stack().shape == (N, 3, 7, 7)


# ---- files that are not read


def refused(path, *parts, **options):
    with pytest.raises(DataError) as caught:
        open_beton(path, **options)
    assert "\n" not in str(caught.value)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "no.beton", "does not exist")


def test_a_truncated_file_is_refused(beton):
    os.truncate(beton, beton.stat().st_size - 1)
    refused(beton, "bytes", "were written")


@pytest.mark.parametrize("where", [3, 2200, 8 << 20, -20])
def test_a_flipped_bit_is_found_anywhere_in_the_file(beton, where):
    data = np.fromfile(beton, dtype=np.uint8)
    data[where] ^= 4
    data.tofile(beton)
    refused(beton, "damaged", "sha256")


def test_a_file_without_its_manifest_is_refused(beton):
    manifest_path(beton).unlink()
    refused(beton, "was not finished")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "another"}', '{"format": "hpc-supcon beton 1"}'])
def test_a_damaged_manifest_is_refused(beton, text):
    manifest_path(beton).write_text(text)
    refused(beton, "manifest")


def test_a_manifest_of_another_file_is_refused(arrays, beton, tmp_path):
    other = tmp_path / "other.beton"
    convert(arrays.subset(range(30)), other)
    shutil.copy(manifest_path(other), manifest_path(beton))
    refused(beton)


def test_a_file_of_another_data_set_is_refused(beton):
    assert len(open_beton(beton, name="synthetic/train")) == 70
    refused(beton, "contains 'synthetic/train', not 'cifar10/train'", name="cifar10/train")


def test_a_sample_damaged_after_the_check_of_the_file_is_named(beton):
    row = int(np.flatnonzero(open_beton(beton).columns["mode"] == 0)[0])
    source = open_beton(beton)
    data = np.fromfile(beton, dtype=np.uint8)
    ptr = source.columns["ptr"][row]
    data[ptr : ptr + 200] = 0
    data.tofile(beton)
    source = open_beton(beton, check_hash=False)
    with pytest.raises(CorruptSample, match=f"train.beton: sample {row} does not decode"):
        source.read(row)


# ---- files that are not written


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "text"])
def test_a_corrupt_image_is_named_and_leaves_no_file(damaged, tmp_path, kind):
    source, _, path = damaged(kind)
    with pytest.raises(CorruptSample, match=str(path)):
        convert(source, tmp_path / "a.beton")
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "options",
    [{"raw_fraction": 1.5}, {"jpeg_quality": 0}, {"jpeg_quality": 100}, {"max_size": 0}],
)
def test_options_out_of_range_are_refused(arrays, tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        convert(arrays, tmp_path / "a.beton", **options)


def test_a_name_without_the_suffix_is_refused(arrays, tmp_path):
    with pytest.raises(ConfigError, match=r"end in \.beton"):
        convert(arrays, tmp_path / "a.bin")


def test_an_image_larger_than_a_page_is_named(tmp_path):
    source = ArraySource(torch.zeros(1, 3, 1700, 1700, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["a"])
    with pytest.raises(DataError, match=r"image 0 takes 8670000 bytes.*--max-size"):
        convert(source, tmp_path / "a.beton", raw_fraction=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_the_old_files(arrays, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("MOUNTING A SMALL FILE SYSTEM NEEDS ROOT; the test that simulates a full disk does not")
    try:
        convert(arrays.subset(range(20)), disk / "a.beton")  # 8 MiB of it are holes
        (disk / "filler").write_bytes(bytes((9 << 20) - 200_000))
        with pytest.raises(DataError, match=r"a\.beton cannot be written: No space left on device"):
            convert(big(), disk / "a.beton", raw_fraction=1.0)
        assert sorted(p.name for p in disk.iterdir()) == ["a.beton", "a.beton.json", "filler"]
        assert len(open_beton(disk / "a.beton")) == 20
    finally:
        subprocess.run(["umount", disk], check=True)


def big() -> ArraySource:
    return ArraySource(torch.ones(9, 3, 600, 600, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ["a"])


def test_a_disk_that_is_full_only_at_fsync_leaves_no_file(arrays, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        convert(arrays, tmp_path / "a.beton")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_file_that_can_be_opened(tmp_path, python):
    """SIGKILL when half is written, so that nothing is cleaned up."""
    code = """
import os, signal, sys
from hpc_supcon.data import load_splits
from hpc_supcon.data.sources.convert import convert
source = load_splits("synthetic", synthetic={"images": 700, "classes": 5}, validation_fraction=0).train
convert(source, sys.argv[1], progress=lambda done, n: os.kill(os.getpid(), signal.SIGKILL) if done > 300 else None)
"""
    path = tmp_path / "a.beton"
    assert subprocess.run([python, "-c", code, path]).returncode == -9
    assert not path.exists()
    assert not manifest_path(path).exists()
    assert len(list(tmp_path.iterdir())) == 1
