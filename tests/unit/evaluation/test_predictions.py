"""predictions.parquet: its rows, several probes in one file, what it refuses."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hpc_supcon.errors import MissingExtra, RunFolderError
from hpc_supcon.evaluation import predictions
from hpc_supcon.evaluation.predictions import (
    PREDICTIONS,
    check_predictions,
    gather_predictions,
    path_text,
    write_predictions,
)
from hpc_supcon.evaluation.scores import gather_outcomes


def predicted(n, classes, seed=0, index=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    index = torch.arange(n) if index is None else torch.tensor(index)
    return gather_predictions(gather_outcomes(logits, labels, "a probe"), logits, index), logits, labels


def write(folder, probe, **splits):
    paths = dict.fromkeys(splits)
    write_predictions(folder, probe, splits, paths=paths, root=None)


def rows_of(folder, probe):
    return [row for row in pq.read_table(folder / PREDICTIONS).to_pylist() if row["probe"] == probe]


def test_a_row_for_each_image_with_its_index_and_path(tmp_path):
    got, logits, labels = predicted(4, 3, index=[0, 2, 3, 6])
    files = [Path(f"/images/test/a/{i}.png") for i in range(7)]
    write_predictions(tmp_path, "knn", {"test": got}, paths={"test": files}, root=Path("/images"))
    table = pq.read_table(tmp_path / PREDICTIONS)
    assert table.schema.equals(
        pa.schema(
            {
                "probe": pa.string(), "split": pa.string(), "index": pa.int64(), "path": pa.string(),
                "label": pa.int32(), "prediction": pa.int32(), "probabilities": pa.list_(pa.float32()),
            }
        )
    )  # fmt: skip
    found = table.to_pydict()
    assert found["probe"] == ["knn"] * 4
    assert found["split"] == ["test"] * 4
    assert found["index"] == [0, 2, 3, 6]
    assert found["path"] == ["test/a/0.png", "test/a/2.png", "test/a/3.png", "test/a/6.png"]
    assert found["label"] == labels.tolist()
    assert found["prediction"] == logits.argmax(dim=1).tolist()
    want = logits.double().softmax(dim=1).float()
    assert np.array_equal(np.array(found["probabilities"], dtype=np.float32), want.numpy())


def test_a_probe_replaces_its_own_rows_and_no_others(tmp_path):
    a, b, c = (predicted(n, 3, seed=n)[0] for n in (5, 6, 7))
    write(tmp_path, "linear", validation=a, test=b)
    write(tmp_path, "knn", test=c)
    linear = rows_of(tmp_path, "linear")
    assert [row["split"] for row in linear] == ["validation"] * 5 + ["test"] * 6
    write(tmp_path, "knn", test=a)
    assert len(rows_of(tmp_path, "knn")) == 5
    assert rows_of(tmp_path, "linear") == linear
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_row_groups_are_bounded_and_no_row_is_lost(tmp_path, monkeypatch):
    got, logits, _ = predicted(50, 4)
    monkeypatch.setattr(predictions, "_NUMBERS", 30)  # seven rows
    write(tmp_path, "linear", test=got)
    write(tmp_path, "knn", test=got)
    file = pq.ParquetFile(tmp_path / PREDICTIONS)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == 2 * ([7] * 7 + [1])
    for probe in ("linear", "knn"):
        rows = rows_of(tmp_path, probe)
        assert [row["index"] for row in rows] == list(range(50))
        assert [row["prediction"] for row in rows] == logits.argmax(dim=1).tolist()


def test_no_rows_are_lost_when_several_probes_write_at_once(tmp_path):
    got = predicted(5, 3)[0]
    start = threading.Barrier(4)

    def many(name):
        start.wait()
        for i in range(5):
            write(tmp_path, f"{name}-{i}", test=got)

    writers = [threading.Thread(target=many, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    probes = pq.read_table(tmp_path / PREDICTIONS)["probe"].to_pylist()
    assert sorted(set(probes)) == [f"{name}-{i}" for name in "abcd" for i in range(5)]
    assert len(probes) == 100


def test_file_names_that_are_no_text_are_readable_and_unequal(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), "café.png", "two\nlines.png", "犬.png"]
    got = predicted(4, 2)[0]
    files = [Path("/images/test") / name for name in names]
    write_predictions(tmp_path, "knn", {"test": got}, paths={"test": files}, root=Path("/images"))
    want = [r"test/caf\xe9.png", "test/café.png", "test/two\nlines.png", "test/犬.png"]
    assert [row["path"] for row in rows_of(tmp_path, "knn")] == want
    assert path_text(Path("/elsewhere/x.png"), Path("/images")) == "/elsewhere/x.png"
    assert path_text(Path("data/a/x.png"), Path("data")) == "a/x.png"


@pytest.mark.parametrize("content", ["nothing", "text", "cut", "other columns"])
def test_what_is_no_file_of_predictions_is_named_and_kept(tmp_path, content):
    path = tmp_path / PREDICTIONS
    write(tmp_path, "knn", test=predicted(5, 3)[0])
    if content == "other columns":
        pq.write_table(pa.table({"probe": ["a"]}), path)
    else:
        path.write_bytes({"nothing": b"", "text": b"hello", "cut": path.read_bytes()[:-3]}[content])
    before = path.read_bytes()
    for call in (lambda: check_predictions(tmp_path), lambda: write(tmp_path, "linear", test=predicted(5, 3)[0])):
        with pytest.raises(
            RunFolderError, match=r"predictions\.parquet: damaged, or not a file of predictions; move"
        ):
            call()
    assert path.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_disk_that_fails_is_named_and_the_file_stays(tmp_path, monkeypatch):
    write(tmp_path, "knn", test=predicted(5, 3)[0])
    before = (tmp_path / PREDICTIONS).read_bytes()

    def full(self, table):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunFolderError, match=r"predictions\.parquet: not written: No space left on device"):
        write(tmp_path, "linear", test=predicted(5, 3)[0])
    assert (tmp_path / PREDICTIONS).read_bytes() == before


def test_without_pyarrow_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for call in (lambda: check_predictions(tmp_path), lambda: write(tmp_path, "knn", test=predicted(5, 3)[0])):
        with pytest.raises(
            MissingExtra, match=r"predictions\.parquet is not written: it needs pyarrow .*pip install"
        ):
            call()
    assert list(tmp_path.iterdir()) == []
