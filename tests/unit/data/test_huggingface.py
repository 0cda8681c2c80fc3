"""Claims about data sets of the package `datasets`: columns by type, splits by name, errors in one line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import Columns, convert_splits, fingerprint, load_splits, open_source
from hpc_supcon.data.sources import huggingface
from hpc_supcon.data.sources.encoded import EncodedSource
from hpc_supcon.data.sources.image_file import ImageFormat
from hpc_supcon.errors import CorruptSample, DataError, MissingExtra

NAMES = ["zebra", "ant", "bee"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def images(values):
    return [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in values]


def dataset(values, features=None, **columns):
    """Image i is of brightness values[i]; its label is values[i] % 3, a ClassLabel where nothing else is given."""
    columns = columns or {"label": [value % 3 for value in values]}
    types = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)} | (features or {})
    types = {key: types[key] for key in ("img", *columns) if key in types}
    given = {"img": images(values), **columns}
    return datasets.Dataset.from_dict(given, datasets.Features(types))


@pytest.fixture
def saved(tmp_path):
    found = {"train": dataset(range(6)), "test": dataset(range(6, 9)), "unsupervised": dataset(range(3))}
    datasets.DatasetDict(found).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def brightness(source):
    return source.stack()[:, 0, 0, 0].tolist()


def test_a_saved_dataset_gives_splits_labels_and_classes(saved):
    splits = open_source("huggingface", saved)
    assert splits.classes == tuple(NAMES)
    assert (brightness(splits.train), brightness(splits.test)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 1, 2])
    assert splits.validation is None
    assert (splits.channels, splits.image_size) == (3, 4)


def test_it_is_split_fingerprinted_sent_and_converted_as_others_are(saved, tmp_path):
    splits = load_splits("huggingface", root=saved, validation_fraction=0.4, seed=2)
    assert sorted(brightness(splits.train) + brightness(splits.validation)) == list(range(6))
    assert torch.equal(pickle.loads(pickle.dumps(splits.train)).stack(), splits.train.stack())
    again = load_splits("huggingface", root=saved, validation_fraction=0.4, seed=2)
    assert fingerprint(again) == fingerprint(splits)
    assert fingerprint(load_splits("huggingface", root=saved, validation_fraction=0.4, seed=3)) != fingerprint(splits)
    convert_splits("huggingface", open_source("huggingface", saved), tmp_path / "h.beton")
    assert load_splits("huggingface", beton=tmp_path / "h.beton", validation_fraction=0).classes == tuple(NAMES)


def test_a_folder_of_parquet_files_is_read(tmp_path):
    (tmp_path / "p" / "data").mkdir(parents=True)
    for name, values in {"train-00000-of-00002": [0, 1], "train-00001-of-00002": [2], "validation-0": [3, 4]}.items():
        dataset(values).to_parquet(str(tmp_path / "p" / "data" / f"{name}.parquet"))
    splits = open_source("huggingface", tmp_path / "p")
    assert (brightness(splits.train), brightness(splits.test), splits.validation) == ([0, 1, 2], [3, 4], None)
    assert splits.classes == tuple(NAMES)
    dataset([1]).to_parquet(str(tmp_path / "p" / "data" / "more.parquet"))
    with pytest.raises(DataError, match=r"more.parquet: its name says no split: call it train-"):
        open_source("huggingface", tmp_path / "p")


def save(root, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return root


@pytest.mark.parametrize(
    ("values", "kind", "classes", "labels"),
    [
        ([10, 9, 9, 10], datasets.Value("int64"), ("9", "10"), [1, 0, 0, 1]),
        (["b", "a", "a", "b"], datasets.Value("string"), ("a", "b"), [1, 0, 0, 1]),
    ],
)
def test_plain_labels_become_classes(tmp_path, values, kind, classes, labels):
    one = dataset(range(4), {"label": kind}, label=values)
    splits = open_source("huggingface", save(tmp_path / "a", train=one, test=one))
    assert (splits.classes, splits.train.labels.tolist()) == (classes, labels)


def test_columns_can_be_named_and_images_be_files(tmp_path):
    paths = []
    for i, image in enumerate(images([7, 8])):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    types = {"img": datasets.Image(), "second": datasets.Image(), "kind": datasets.Value("string")}
    given = {"img": images([1, 2]), "second": paths, "kind": ["a", "b"]}
    one = datasets.Dataset.from_dict(given, datasets.Features(types))
    root = save(tmp_path / "a", train=one, test=one)
    assert brightness(open_source("huggingface", root, columns=Columns("second", "kind")).train) == [7, 8]
    with pytest.raises(DataError, match=r"2 columns of images: img \(Image\), second \(Image\), kind \(Value\); set"):
        open_source("huggingface", root)
    with pytest.raises(DataError, match=r"data.columns.image=kind is no column of the type Image"):
        open_source("huggingface", root, columns=Columns("kind"))
    with pytest.raises(DataError, match=r"no column of labels is found by its type.*set data.columns.label, or"):
        open_source("huggingface", root, columns=Columns("img"))
    with pytest.raises(DataError, match=r"second is no column of labels"):
        open_source("huggingface", root, columns=Columns("img", "second"))


def test_without_labels_a_dataset_alone_is_of_train(tmp_path):
    dataset(range(4)).save_to_disk(str(tmp_path / "a"))
    splits = load_splits("huggingface", root=tmp_path / "a", labels="none", validation_fraction=0.25)
    assert (splits.classes, splits.test, len(splits.train), len(splits.validation)) == ((), None, 3, 1)
    with pytest.raises(DataError, match=r"no test split: save a DatasetDict with train and test"):
        open_source("huggingface", tmp_path / "a")


def refused(root, **options):
    with pytest.raises(DataError) as raised:
        open_source("huggingface", root, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bad_sets_and_rows_are_named(tmp_path, saved):
    assert "is no folder: name one that save_to_disk wrote" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "it holds no data set of save_to_disk and no Parquet files" in refused(tmp_path / "empty")
    (saved / "train" / "state.json").write_text("{")
    assert f"{saved} cannot be opened (" in refused(saved)
    train, test = dataset(range(4)), dataset(range(2))
    assert "no train split, but test" in refused(save(tmp_path / "b", test=test))
    unlabeled = dataset(range(2), label=[0, -1])
    text = refused(save(tmp_path / "c", train=train, test=unlabeled))
    assert text == f"{tmp_path / 'c'}, test split, row 2: the label is empty: add one, or remove the image"
    types = {"label": datasets.Value("string")}
    one, other = dataset(range(2), types, label=["a", "b"]), dataset(range(2), types, label=["a", "c"])
    assert "test split, row 2: no training image has the label 'c'" in refused(
        save(tmp_path / "d", train=one, test=other)
    )
    no_images = datasets.Dataset.from_dict({"label": [1]})
    assert "has no column of the type Image: label (Value)" in refused(
        save(tmp_path / "e", train=no_images, test=no_images)
    )
    assert "data.root=hf:a/b/c: expected hf:OWNER/NAME" in refused("hf:a/b/c")
    with pytest.raises(DataError, match=r"huggingface needs data.root: a folder of save_to_disk"):
        open_source("huggingface")


def test_images_that_are_not_there_are_corrupt():
    given = [None, {"bytes": b"no image", "path": None}, {"bytes": None, "path": "/nowhere.png"}]
    one = datasets.Dataset.from_dict({"img": given}, datasets.Features({"img": datasets.Image()}))
    found = huggingface._images(one, "img", "set, train split")
    image_format = ImageFormat(3, 4, convert=True, resize=True, reference=Path("any"))
    train = EncodedSource(found, torch.arange(3), torch.zeros(3, dtype=torch.int64), ("a",), image_format)
    for i, message in enumerate(
        ["it has no image", "does not decode: it is not a JPEG", "/nowhere.png cannot be read"]
    ):
        with pytest.raises(CorruptSample) as raised:
            train.read(i)
        assert message in str(raised.value)
        assert f"set, train split, row {i + 1}" in str(raised.value)


def test_the_hub_without_a_network_is_one_line_at_once(tmp_path, capfd):
    code = (
        "import socket; from hpc_supcon.data import open_source\n"
        "socket.create_connection = lambda *_, **__: (_ for _ in ()).throw(OSError('no route'))\n"
        "open_source('huggingface', 'hf:owner/name')"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    lines = found.stderr.strip().splitlines()
    assert lines[0].startswith("Traceback"), "nothing is printed before"
    assert lines[-1].startswith("hpc_supcon.errors.DataError: hf:owner/name cannot be opened (")
    assert lines[-1].endswith("; the hub cannot be reached from here: save it where it can be, and name the folder")


def test_names_of_the_hub_are_taken_apart(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((*arguments, options["revision"]))
        return datasets.DatasetDict({"train": dataset(range(3)), "test": dataset(range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface, "_hub_is_reachable", lambda: True)
    for root in ("hf:mnist", "hf:owner/name", "hf:owner/na.me:plain_text", "hf:o/n@refs/pr/1", "hf:o/n:c@abc"):
        open_source("huggingface", root)
    assert asked == [
        ("mnist", None, None),
        ("owner/name", None, None),
        ("owner/na.me", "plain_text", None),
        ("o/n", None, "refs/pr/1"),
        ("o/n", "c", "abc"),
    ]


def test_without_the_package_its_install_line_is_given(monkeypatch, saved):
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs `datasets`: pip install 'hpc-supcon\[huggingface\]'"):
        open_source("huggingface", saved)
