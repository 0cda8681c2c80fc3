"""Claims about images that a table names: which columns, splits and labels are found, and how rows are named."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from hpc_supcon.data import Columns, convert_splits, fingerprint, load_splits, open_source
from hpc_supcon.data.loaders import LoaderOptions, choose_loader
from hpc_supcon.data.sources.verify import verify
from hpc_supcon.errors import ConfigError, DataError

SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 3
LABELS = ["cat", "dog", "cat", "dog", "cat", "dog", "dog", "cat", "dog", "cat", "dog"]


@pytest.fixture
def images(tmp_path):
    """Paths, relative to the folder, of 11 gray images; image i is of brightness i."""
    (tmp_path / "im gs").mkdir()
    for i in range(11):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "im gs" / f"{i}.png")
    return [f"im gs/{i}.png" for i in range(11)]


def write(path, columns):
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        rows = [columns.keys(), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join(mark.join(map(str, row)) for row in rows) + "\n")
    return path


def brightness(source):
    return source.stack()[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_gives_splits_labels_and_classes(tmp_path, images, ending):
    file = write(tmp_path / f"all.{ending}", {"label": LABELS, "path": images, "split": SPLITS})
    splits = open_source("manifest", file)
    assert splits.classes == ("cat", "dog")
    assert [brightness(s) for s in vars(splits).values()] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    assert [s.labels.tolist() for s in vars(splits).values()] == [[0, 1, 0, 1, 0, 1], [1, 0], [1, 0, 1]]
    assert (splits.channels, splits.image_size) == (1, 4)
    assert splits.train.paths[0] == tmp_path / "im gs" / "0.png"


def test_a_folder_of_tables_is_a_split_each(tmp_path, images):
    for name, rows in {"train": slice(6), "valid": slice(6, 8), "test": slice(8, 11)}.items():
        write(tmp_path / f"{name}.csv", {"file": images[rows], "class": LABELS[rows]})
    write(tmp_path / "notes.csv", {"any": [1]})
    splits = load_splits("manifest", root=tmp_path)
    assert [len(s) for s in vars(splits).values()] == [6, 2, 3]


def test_where_only_validation_exists_it_is_the_test_set(tmp_path, images):
    write(tmp_path / "train.csv", {"path": images[:6], "label": LABELS[:6]})
    write(tmp_path / "val.csv", {"path": images[6:], "label": LABELS[6:]})
    splits = open_source("manifest", tmp_path)
    assert splits.validation is None
    assert len(splits.test) == 5


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path, images):
    numbers = [10, 9, 100, 9, 10, 100, 9, 9, 10, 100, 9]
    for name in ("a.csv", "a.parquet"):
        splits = open_source("manifest", write(tmp_path / name, {"path": images, "label": numbers, "split": SPLITS}))
        assert splits.classes == ("9", "10", "100")
        assert splits.test.labels.tolist() == [1, 2, 0]


def test_columns_and_the_folder_of_images_can_be_named(tmp_path, images):
    (tmp_path / "sub").mkdir()
    columns = {"path": ["x"] * 11, "where": images, "kind": LABELS, "part": SPLITS}
    file = write(tmp_path / "sub" / "all.csv", columns)
    options = {"columns": Columns("where", "kind", "part"), "image_root": tmp_path}
    assert brightness(open_source("manifest", file, **options).test) == [8, 9, 10]
    absolute = [os.fspath(tmp_path / path) for path in images]
    file = write(tmp_path / "sub" / "abs.csv", {"path": absolute, "label": LABELS, "split": SPLITS})
    assert brightness(open_source("manifest", file).test) == [8, 9, 10]


def test_quotes_commas_and_a_byte_order_mark_are_read(tmp_path, images):
    (tmp_path / "a,b.png").write_bytes((tmp_path / images[3]).read_bytes())
    file = tmp_path / "all.csv"
    text = (
        f'\ufeffpath,label,split\r\n"a,b.png","big, cat",train\r\n{images[5]},dog,train\r\n{images[6]},dog,test\r\n'
    )
    file.write_bytes(text.encode())
    splits = open_source("manifest", file)
    assert splits.classes == ("big, cat", "dog")
    assert brightness(splits.train) == [3, 5]


def test_without_labels_no_column_of_them_is_needed(tmp_path, images):
    file = write(tmp_path / "all.csv", {"path": images})
    splits = load_splits("manifest", root=file, labels="none", validation_fraction=0)
    assert (splits.classes, splits.test, len(splits.train)) == ((), None, 11)
    file = write(tmp_path / "split.csv", {"path": images, "split": SPLITS})
    assert len(load_splits("manifest", root=file, labels="none").test) == 3


def refused(root, **options):
    with pytest.raises(DataError) as raised:
        open_source("manifest", root, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_bad_rows_are_named(tmp_path, images, ending):
    def message(**changed):
        columns = {"path": list(images), "label": list(LABELS), "split": list(SPLITS)}
        for key, (rows, value) in changed.items():
            for row in rows:
                columns[key][row] = value
        return refused(write(tmp_path / f"all.{ending}", columns))

    where = str(tmp_path / f"all.{ending}")
    assert message(path=([2], "gone.png")).startswith(f"{where}, row 3: {tmp_path / 'gone.png'} does not exist, or")
    assert message(path=([0, 1, 2, 3, 9], "gone.png")).startswith(f"{where}, rows 1, 2, 3 and 1 more: ")
    assert message(path=([4], "")) == f"{where}, row 5: the path of the image is empty"
    assert message(label=([1, 5], "")).startswith(f"{where}, rows 2, 6: the label is empty: add one")
    assert message(label=([9], "cow")).startswith(f"{where}, row 10: no training image has the label 'cow'")
    assert message(split=([9], "tset")) == (
        f"{where}, row 10: the split is 'tset'; expected train, validation or test"
    )
    assert message(split=([9], "")).startswith(f"{where}, row 10: the split is ''")


def test_bad_tables_are_named(tmp_path, images):
    file = write(tmp_path / "a.csv", {"path": images, "label": LABELS, "split": ["train"] * 11})
    assert "no test split: give a column of splits" in refused(file)
    file = write(tmp_path / "a.csv", {"path": images, "label": LABELS, "split": ["test"] * 11})
    assert "no rows of train" in refused(file)
    file = write(tmp_path / "a.csv", {"pth": images, "label": LABELS, "split": SPLITS})
    text = refused(file)
    assert text.startswith(f"{file} has no column called path, file, filename")
    assert "but pth, label, split: set data.columns.image" in text
    file = write(tmp_path / "a.csv", {"path": images, "split": SPLITS})
    assert "but path, split: set data.columns.label, or data.labels=none" in refused(file)
    assert "has no column 'kind' (data.columns.label), but path, split" in refused(
        file, columns=Columns(label="kind")
    )
    assert "no test split" in refused(write(tmp_path / "b.csv", {"path": images, "label": LABELS}))
    assert "does not exist: name a .csv, .tsv or .parquet" in refused(tmp_path / "none.csv")
    assert "must end in .csv, .tsv, .parquet" in refused(tmp_path / images[0])
    (tmp_path / "c.csv").write_text("path,label,split\n")
    assert "it has no rows" in refused(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("")
    assert "cannot be read: Empty CSV file" in refused(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("path,label,split\na,b\n")
    assert "cannot be read: CSV parse error: Row #2: Expected 3 columns, got 2" in refused(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_bytes(b"path,label,split\n\xff,b,train\n")
    assert "cannot be read: " in refused(tmp_path / "c.csv")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not all")
    assert "c.parquet cannot be read: " in refused(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"manifest needs data.root: a CSV"):
        open_source("manifest")


def test_columns_of_other_types_are_refused(tmp_path, images):
    columns = {"path": images, "label": [0.5] * 11, "split": SPLITS}
    assert "column 'label' is of type double: expected text or integers" in refused(
        write(tmp_path / "a.parquet", columns)
    )
    columns = {"image": [{"bytes": b"", "path": ""}] * 11, "label": LABELS, "split": SPLITS}
    assert "column 'image' has no paths but struct" in refused(write(tmp_path / "a.parquet", columns))
    columns = {
        "path": pa.array(images).dictionary_encode(),
        "label": pa.array(LABELS).dictionary_encode(),
        "split": SPLITS,
    }
    assert open_source("manifest", write(tmp_path / "b.parquet", columns)).classes == ("cat", "dog")


def test_repeated_images_are_noted(tmp_path, images):
    notes = []
    file = write(tmp_path / "a.csv", {"path": [*images[:10], images[0]], "label": LABELS, "split": SPLITS})
    open_source("manifest", file, note=notes.append)
    assert notes == [f"{file}: 1 images are named more than once, in one split or in several"]


def test_two_files_of_one_split_are_refused(tmp_path, images):
    for name in ("train.csv", "train.tsv", "test.csv"):
        write(tmp_path / name, {"path": images, "label": LABELS})
    assert "are both of train" in refused(tmp_path)


def test_files_are_looked_for_by_one_rank_of_a_node(tmp_path, images):
    file = write(tmp_path / "a.csv", {"path": ["gone.png", *images[1:]], "label": LABELS, "split": SPLITS})
    assert len(load_splits("manifest", root=file, check_hash=False, image_size=4, channels=1).train) == 6


def test_a_manifest_is_served_verified_and_converted_as_a_folder_is(tmp_path, images, monkeypatch):
    file = write(tmp_path / "all.csv", {"path": images, "label": LABELS, "split": SPLITS})
    splits = open_source("manifest", file)
    assert [report.images for report in verify(file, source="manifest").values()] == [6, 2, 3]
    convert_splits("manifest", splits, tmp_path / "m.beton")
    converted = load_splits("manifest", beton=tmp_path / "m.beton")
    assert converted.classes == splits.classes
    assert torch.equal(converted.test.labels, splits.test.labels)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "im gs").rename(moved / "im gs")
    file.rename(moved / "all.csv")
    assert fingerprint(open_source("manifest", moved / "all.csv")) == fingerprint(
        open_source(
            "manifest",
            write(tmp_path / "x.csv", {"path": images, "label": LABELS, "split": SPLITS}),
            image_root=moved,
        )
    )
    assert choose_loader(splits.train, "cpu", LoaderOptions())[0] == "resident"
    with pytest.raises(ConfigError, match=r"data.beton=x.beton: .beton files are not made of"):
        load_splits("own", datasets=(splits.train,), beton="x.beton")
