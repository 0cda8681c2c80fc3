"""Claims about the fingerprint of a data set: equal for equal data anywhere, and it says what differs."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import ArraySource, DataFingerprint, Splits, convert_splits, fingerprint, load_splits
from hpc_supcon.data.fingerprint import class_differences
from hpc_supcon.data.sources.file_sizes import file_sizes

CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path):
    """12 cats and 8 dogs in train, 2 of each in test; names are numbers, and all files have one size."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (12, 8), "test": (2, 2)}.items():
        for name, n in zip(CLASSES, counts, strict=True):
            (tmp_path / "a" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "a" / split / name / f"{i:02d}.png")
    return tmp_path / "a"


def taken(root, fraction=0.0, **options):
    return fingerprint(load_splits("image_folder", root=root, validation_fraction=fraction, **options))


@pytest.fixture
def before(root):
    return taken(root)


def test_a_copy_elsewhere_with_other_times_is_the_same(root, before, tmp_path):
    shutil.copytree(root, tmp_path / "b")
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (1, 1))
    assert taken(tmp_path / "b") == before
    assert before.differences(before) == []


def test_it_survives_json(before):
    assert DataFingerprint.from_json(json.loads(json.dumps(before.as_json()))) == before


def test_nothing_is_decoded(root, monkeypatch):
    splits = load_splits("image_folder", root=root, validation_fraction=0)
    monkeypatch.setattr(Image, "open", None)
    fingerprint(splits)


def remove(root):
    for i in range(4):
        (root / f"train/cat/{i:02d}.png").unlink()


def swap(root):
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "dog").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "dog")


def swap_test(root):
    """Two folders with equally many files of the same names."""
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (root / "test" / old).rename(root / "test" / new)


def add_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "dog", root / split / "ship")


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "ship")


def rename_file(root):
    (root / "train/cat/00.png").rename(root / "train/cat/0.png")


def lengthen(root):
    with (root / "train/dog/03.png").open("ab") as file:
        file.write(b"1")


def change_a_byte(root):
    path = root / "train/dog/03.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def move_between_classes(root):
    (root / "train/cat/00.png").rename(root / "train/dog/99.png")


def break_a_link(root):
    path = root / "train/cat/01.png"
    path.unlink()
    path.symlink_to(root / "nowhere.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, ["4 images fewer in train (16, not 20; cat: 8, not 12)"]),
        (swap, ["other labels in train; cat: 8, not 12; dog: 12, not 8", "files of another content in test"]),
        (swap_test, ["files of another content in test"]),
        (
            add_class,
            ["class added: ship", "8 images more in train (28, not 20)", "2 images more in test (6, not 4)"],
        ),
        (rename_class, ["class added: ship", "class missing: dog"]),
        (rename_file, ["files of other names in train"]),
        (lengthen, ["files of another size in train"]),
        (change_a_byte, ["files of another content in train"]),
        (move_between_classes, ["other labels in train; cat: 11, not 12; dog: 9, not 8"]),
        (break_a_link, ["files of another size in train"]),
    ],
)
def test_it_says_what_changed(root, before, change, said):
    change(root)
    assert taken(root).differences(before) == said


def test_classes_in_another_order():
    assert class_differences(("a", "c", "b"), ("a", "b", "c")) == ["classes in another order: class 1 is c, not b"]
    assert class_differences(("a", "b"), ("a", "b")) == []


def test_of_many_classes_a_few_are_named():
    (said,) = class_differences([f"c{i}" for i in range(1000)], ["c0"])
    assert said == "classes added: c1, c2, c3, and 996 more"


def test_a_validation_split_that_is_there_no_more(root, before):
    shutil.copytree(root / "test", root / "val")
    now = taken(root)
    assert now.differences(before) == ["a validation split"]
    assert before.differences(now) == ["no validation split"]


def test_a_fifo_is_not_opened(root):
    os.mkfifo(root / "train/cat/pipe.png")
    assert file_sizes([root / "train/cat/pipe.png"]).tolist() == [-1]


def test_pixels_and_labels_of_a_set_in_memory_count():
    images = torch.arange(4 * 3 * 4, dtype=torch.uint8).view(4, 3, 2, 2)
    labels = torch.tensor([0, 0, 1, 1])

    def of(images, labels):
        source = ArraySource(images, labels, CLASSES)
        return fingerprint(Splits(source, None, source))

    now = of(images, labels)
    assert of(images.clone(), labels.clone()).differences(now) == []
    said = of(images.flip(0), labels).differences(now)
    assert said == ["other arrays of pixels in train", "other arrays of pixels in test"]
    assert of(images, labels.flip(0)).differences(now) == ["other labels in train", "other labels in test"]
    assert of(images.view(4, 3, 4, 1).expand(-1, -1, -1, 4), labels).differences(now)


def test_a_beton_file_counts_by_what_is_in_it(root, tmp_path):
    def converted(folder, **options):
        folder.mkdir()
        splits = load_splits("image_folder", root=root, validation_fraction=0)
        convert_splits("image_folder", splits, folder / "a.beton", **options)
        return fingerprint(load_splits("image_folder", beton=folder / "a.beton", validation_fraction=0.2))

    first = converted(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "moved")
    moved = load_splits("image_folder", beton=tmp_path / "moved/a.beton", validation_fraction=0.2)
    assert fingerprint(moved) == first
    other = converted(tmp_path / "y", jpeg_quality=50)
    assert other.differences(first) == [f"other .beton files in {name}" for name in ("train", "validation", "test")]
    assert taken(root, fraction=0.2).differences(first) == ["image files in place of .beton files"]
