"""metrics.jsonl and TensorBoard: torn lines, steps that are told again, and a disk that fails."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest

from hpc_supcon import metric_file
from hpc_supcon.config import load_config
from hpc_supcon.metric_file import AppendedLines, read_events, rewind
from hpc_supcon.training import tensorboard
from hpc_supcon.training.metrics import MetricLog
from hpc_supcon.training.tensorboard import TensorBoard


def line(event, step):
    return json.dumps({"event": event, "step": step}) + "\n"


def told(path):
    return [(event["event"], event["step"]) for event in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


TORN = [
    '{"event": "train", "step": 3, "lo',
    "\0\0\0\0",
    "{}",
    "3",
    '{"event": "train"}',
    '{"event": "x", "step": "1"}',
]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("end", ["", "\n"])
def test_readers_pass_over_a_line_that_is_not_whole(path, torn, end):
    path.write_text(line("train", 1) + torn + end)
    assert [event["step"] for event in read_events(path)] == [1]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_set_aside_with_one_line_and_a_new_one_begun(path, torn):
    path.write_text(line("train", 1) + torn)
    warnings = []
    lines = AppendedLines(path, warnings.append)
    lines.write(line("start", 1).strip())
    lines.write(line("train", 2).strip())
    lines.close()
    assert told(path) == [("train", 1), ("start", 1), ("train", 2)]
    assert (path.parent / "metrics.jsonl.torn").read_text() == torn + "\n"
    assert warnings == [f"{path}: 1 torn line moved to metrics.jsonl.torn"]


def test_a_whole_last_line_without_its_end_is_kept(path):
    path.write_text(line("train", 1).strip())
    lines = AppendedLines(path, pytest.fail)
    lines.write(line("train", 2).strip())
    lines.close()
    assert told(path) == [("train", 1), ("train", 2)]


def test_steps_after_the_checkpoint_are_removed_and_the_history_kept(path):
    before = [("start", 0), ("train", 1), ("validation", 2), ("train", 2), ("preempted", 2), ("start", 2)]
    after = [("train", 3), ("collapsed", 3), ("train", 4), ("validation", 4), ("stopped", 4), ("profile", 4)]
    probes = [("probe/linear", 50), ("probe", 4)]
    path.write_text("".join(line(*event) for event in before + after + probes))
    rewind(path, 2, pytest.fail)
    assert told(path) == before + probes


def test_a_validation_that_is_done_again_is_removed(path):
    events = [("train", 1), ("validation", 1), ("train", 2), ("validation", 2)]
    path.write_text("".join(line(*event) for event in events))
    rewind(path, 2, pytest.fail, validated=1)
    assert told(path) == events[:3]


def test_torn_lines_anywhere_are_set_aside_when_a_run_resumes(path):
    path.write_text(line("train", 1) + "{\n" + line("train", 2) + '{"ev')
    warnings = []
    rewind(path, 2, warnings.append)
    assert told(path) == [("train", 1), ("train", 2)]
    assert (path.parent / "metrics.jsonl.torn").read_text() == '{\n{"ev\n'
    assert warnings == [f"{path}: 2 torn lines moved to metrics.jsonl.torn"]


def test_a_file_that_cannot_be_changed_is_left_as_it_is(path, monkeypatch):
    path.write_text(content := line("train", 1) + line("train", 2))

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metric_file, "write_atomically", full)
    warnings = []
    rewind(path, 1, warnings.append)
    assert path.read_text() == content
    assert warnings == [f"{path}: left as it is, with the steps after 1: No space left on device"]


class FailingDisk:
    """os.write takes `room` bytes in all; then it fails."""

    def __init__(self, monkeypatch, room, number=errno.ENOSPC):
        self.room, self._number, self._write = room, number, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, handle, content):
        if not self.room:
            raise OSError(self._number, os.strerror(self._number))
        written = self._write(handle, content[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("room", [0, 1, len(line("train", 1)) + 5])
def test_lines_wait_for_a_disk_that_fails_and_are_written_once_it_works(path, monkeypatch, room, number):
    warnings = []
    lines, disk = AppendedLines(path, warnings.append), FailingDisk(monkeypatch, room, number)
    for step in (1, 2, 3):
        lines.write(line("train", step).strip())
    assert warnings == [f"{path}: not written: {os.strerror(number)}; the run goes on, and every event tries again"]
    disk.room = 10**6
    lines.write(line("train", 4).strip())
    lines.close()
    assert told(path) == [("train", step) for step in (1, 2, 3, 4)]
    assert len(warnings) == 1


def test_what_is_missing_in_the_end_is_counted(path, monkeypatch):
    warnings = []
    lines, _ = AppendedLines(path, warnings.append), FailingDisk(monkeypatch, 0)
    monkeypatch.setattr(metric_file, "MAX_WAITING", 2 * len(line("train", 1)))
    for step in (1, 2, 3):
        lines.write(line("train", step).strip())
    lines.close()
    assert warnings[1:] == [f"{path}: 3 events are missing"]


def test_a_folder_that_is_gone_or_refuses_files_is_told_once(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with MetricLog(tmp_path, load_config().log) as log:
        log.log("train", 1, loss=1.0)
        log.log("train", 2, loss=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{tmp_path}/tensorboard: not written: ")
    assert lines[1].startswith(f"{tmp_path}/metrics.jsonl: not written: Is a directory")
    assert lines[2].endswith("metrics.jsonl: 2 events are missing")


def scalars(folder, name):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(name)]


def test_tensorboard_is_tried_again_after_its_thread_failed_and_no_traceback_is_printed(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorboard")
    warnings = []
    monkeypatch.setattr(tensorboard, "RETRY_S", 0.0)
    board = tensorboard.TensorBoard(tmp_path / "t", warnings.append)
    board._writer.flush()
    record_writer = board._writer.file_writer.event_writer._async_writer._writer

    def full(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer, "write", full)
    board.add({"loss": 1.0}, 1)
    board._writer.file_writer.event_writer._async_writer._worker.join()
    for step in (2, 3, 4):
        board.add({"loss": 1.0}, step)
    board.close()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path}/t: not written: No space left on device")
    assert scalars(tmp_path / "t", "loss") == [3, 4]
    assert "Traceback" not in capsys.readouterr().err


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    for start, end in ((None, 4), (2, 5)):
        with MetricLog(tmp_path, load_config().log, resumed_at=start) as log:
            for step in range((start or 0) + 1, end + 1):
                log.log("train", step, loss=float(step))
    assert scalars(tmp_path / "tensorboard", "train/loss") == [1, 2, 3, 4, 5]
    assert told(tmp_path / "metrics.jsonl") == [("train", step) for step in (1, 2, 3, 4, 5)]


def test_without_the_package_of_tensorboard_a_line_says_so_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told = []
    board = TensorBoard(tmp_path / "tensorboard", told.append)
    board.add({"train/loss": 1.0}, 1)
    board.close()
    assert len(told) == 1
    assert "tensorboard is not installed" in told[0]
