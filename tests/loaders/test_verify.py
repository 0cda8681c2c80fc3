"""Claims about decoding every image of a data set to find those that cannot be used."""

from __future__ import annotations

import os

import pytest

from hpc_supcon.data.sources.convert import convert
from hpc_supcon.data.sources.verify import verify, verify_source
from hpc_supcon.errors import DataError

from .contract import N, open_train, save, write_folder


def test_a_valid_folder_is_described(tmp_path):
    root = write_folder(tmp_path)
    save(root / "train" / "a" / "00.png", size=(30, 50))
    calls = []
    reports = verify(root, image_size=16, progress=lambda *done: calls.append(done))
    assert list(reports) == ["train", "test"]
    train = reports["train"]
    assert (train.images, train.channels, train.problems) == (N, 3, ())
    assert train.sizes == {(80, 64): N - 1, (30, 50): 1}
    assert train.classes == {"a": 13, "b": 13}
    assert calls == [(N, N), (2, 2)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "does not decode"),
        ("zero bytes", "the file is empty"),
        ("text", "does not decode"),
        ("cmyk", "mode CMYK"),
        ("16 bit", "more than 8 bits"),
        ("gray", "mode L"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_bad_image_is_found_and_named(damaged, kind, message, workers):
    source, index, path = damaged(kind)
    report = verify(path.parents[2], workers=workers)["train"]
    assert [problem.index for problem in report.problems] == [index]
    assert message in report.problems[0].message
    assert str(path) in report.problems[0].message
    assert sum(report.sizes.values()) == N - 1
    assert verify_source(source).problems == report.problems


def test_a_beton_is_checked_against_its_manifest(tmp_path, folder):
    path = tmp_path / "a.beton"
    convert(open_train(folder), path)
    report = verify(path, image_size=16)["a.beton"]
    assert (report.images, report.sizes, report.problems) == (N, {(80, 64): N}, ())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=str(path)):
        verify(path, image_size=16)


def test_a_wrong_layout_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        verify(tmp_path / "nowhere")
