"""metrics-KIND.csv has what metrics.jsonl has, after kills, resumes and full disks as well."""

from __future__ import annotations

import csv
import json

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.metric_file import read_events
from hpc_supcon.training import csv_files
from hpc_supcon.training.csv_files import CsvFiles
from hpc_supcon.training.metrics import MetricLog

TO_CSV = load_config("default", ["log.to=csv"]).log


def rows(folder, kind):
    with (folder / f"metrics-{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def as_events(folder, kind):
    """The rows as the events of metrics.jsonl have them; an empty cell is a value that an event does not have."""
    return [
        {name: json.loads(value) for name, value in row.items() if value != ""} | {"event": kind}
        for row in rows(folder, kind)
    ]


def test_each_kind_of_event_has_its_file_with_the_numbers_of_metrics_jsonl(tmp_path):
    with MetricLog(tmp_path, TO_CSV) as log:
        for step in (1, 2, 3):
            log.log("train", step, loss=1 / step, lr=1e-7)
        log.log("probe/linear", 5, train_loss=0.25)
    events = read_events(tmp_path / "metrics.jsonl")
    assert as_events(tmp_path, "train") == events[:3]
    assert rows(tmp_path, "probe-linear")[0]["train_loss"] == "0.25"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics-probe-linear.csv", "metrics-train.csv", "metrics.jsonl",
    ]  # fmt: skip


def test_a_number_that_appears_later_gets_a_column(tmp_path):
    with MetricLog(tmp_path, TO_CSV) as log:
        log.log("train", 1, loss=1.0)
        log.log("train", 2, loss=0.5, replaced_images=2.0)
        log.log("train", 3, loss=0.25)
    assert [(row["step"], row["loss"], row["replaced_images"]) for row in rows(tmp_path, "train")] == [
        ("1", "1.0", ""), ("2", "0.5", "2.0"), ("3", "0.25", ""),
    ]  # fmt: skip


def test_nested_numbers_have_columns_and_texts_are_quoted(tmp_path):
    with MetricLog(tmp_path, TO_CSV) as log:
        log.log("probe", 1, probe='a "b", c\nd', test={"accuracy": 0.5}, confusion=[[1]])
    (row,) = rows(tmp_path, "probe")
    assert (row["probe"], row["test/accuracy"]) == ('a "b", c\nd', "0.5")
    assert "confusion" not in row


def test_a_resumed_run_has_each_step_once(tmp_path):
    for start, end in ((None, 4), (2, 5)):
        with MetricLog(tmp_path, TO_CSV, resumed_at=start) as log:
            for step in range((start or 0) + 1, end + 1):
                log.log("train", step, loss=float(step))
    assert [row["step"] for row in rows(tmp_path, "train")] == ["1", "2", "3", "4", "5"]


def test_a_torn_line_is_made_whole_when_the_next_process_writes(tmp_path):
    with MetricLog(tmp_path, TO_CSV) as log:
        log.log("train", 1, loss=1.0)
    with (tmp_path / "metrics-train.csv").open("a") as file:
        file.write("2,17")
    with MetricLog(tmp_path, TO_CSV) as log:
        log.log("train", 2, loss=0.5)
    assert as_events(tmp_path, "train") == read_events(tmp_path / "metrics.jsonl")


def test_a_run_that_had_no_csv_before_has_all_its_events(tmp_path):
    with MetricLog(tmp_path) as log:
        log.log("train", 1, loss=1.0)
    with MetricLog(tmp_path, TO_CSV):
        pass
    assert as_events(tmp_path, "train") == read_events(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("retry_s", [0.0, 60.0])
def test_a_disk_that_fails_is_told_once_and_nothing_is_missing_in_the_end(tmp_path, monkeypatch, retry_s):
    monkeypatch.setattr(csv_files, "RETRY_S", retry_s)
    told = []
    jsonl = tmp_path / "metrics.jsonl"
    jsonl.write_text("")
    files = CsvFiles(tmp_path, told.append)
    path = tmp_path / "metrics-train.csv"
    for step in range(1, 7):
        with jsonl.open("a") as file:
            file.write(json.dumps({"event": "train", "step": step, "loss": 1.0}) + "\n")
        if step == 3:
            path.unlink()
            path.mkdir()
        if step == 5:
            path.rmdir()
        files.write("train", step, {"loss": 1.0})
    files.close()
    assert [row["step"] for row in rows(tmp_path, "train")] == ["1", "2", "3", "4", "5", "6"]
    assert told == [f"{path}: not written: Is a directory; the run goes on, and tries again every {retry_s:g} s"]
