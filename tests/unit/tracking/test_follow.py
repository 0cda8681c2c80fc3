"""What a tracker receives from a run folder: each event once, whatever fails in between."""

from __future__ import annotations

import json

import pytest

from hpc_supcon.metric_file import rewind
from hpc_supcon.tracking import TRACKERS, TrackerSpec, check_trackers, follow
from hpc_supcon.tracking.follow import Follower
from hpc_supcon.tracking.record import row_of
from hpc_supcon.tracking.state import read_state
from tests.run_folders import full_run, write_events, write_run

EVERYTHING = ("page", "pictures", "checkpoints")


class Memory:
    """A tracker that fails when `fails` says so."""

    def __init__(self):
        self.rows, self.files, self.entries, self.ended, self.opened = [], [], [], [], []
        self.fails = lambda: False

    def open(self, folder, config, state, tell):
        if state.id is None:
            state.begin("record", "memory")
        self.opened.append(state.id)
        return self

    def log(self, rows):
        if self.fails():
            raise ConnectionError("the server\nis away")
        self.rows += rows

    def results(self, entries):
        self.entries = list(entries)

    def file(self, kind, name, path):
        self.files.append((kind, name))

    def close(self, *, finished):
        self.ended.append(finished)

    def steps(self, kind):
        return [row.step for row in self.rows if row.kind == kind]


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    monkeypatch.setitem(TRACKERS, "memory", TrackerSpec("memory", memory.open))
    return memory


def append(folder, event, step, **values):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "step": step, "time": 1000.0, **values}) + "\n")


def followed(folder, told=None, artifacts=()):
    return Follower(folder, "memory", artifacts, pytest.fail if told is None else told.append)


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "run", results=False)
    write_events(folder, [])
    return folder


def test_every_event_is_told_once_as_it_is_written(memory, folder):
    follower = followed(folder)
    for step in (1, 2, 3):
        append(folder, "train", step, loss=1.0 / step)
        follower.look()
        follower.look()
        assert memory.steps("train") == list(range(1, step + 1))
    follower.finish(finished=False)
    assert (memory.ended, memory.opened) == ([False], ["record"])


def test_events_of_one_millisecond_are_all_told(memory, folder):
    follower = followed(folder)
    for event in ("start", "weights", "probe/linear", "probe/linear"):
        append(folder, event, 0)
        follower.look()
    assert [row.kind for row in memory.rows] == ["start", "weights", "probe/linear", "probe/linear"]


def test_a_line_is_told_when_it_is_whole(memory, folder):
    follower = followed(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
        file.flush()
        follower.look()
        assert memory.rows == []
        file.write('ep": 1}\n')
    follower.look()
    assert memory.steps("train") == [1]


def test_a_resumed_run_goes_on_in_its_record_and_steps_trained_again_are_not_told_again(memory, folder):
    first = followed(folder)
    append(folder, "start", 0, time=1.0)
    for step in (1, 2, 3, 4):
        append(folder, "train", step, time=1.0 + step)
    append(folder, "validation", 4, time=5.5)
    first.finish(finished=False)
    second = followed(folder)
    second.look()  # before the run removes what it trains again
    rewind(folder / "metrics.jsonl", 2, pytest.fail)
    append(folder, "start", 2, time=6.0)
    for step in (3, 4, 5):
        append(folder, "train", step, time=4.0 + step)
        second.look()
    append(folder, "validation", 4, time=9.5)
    second.finish(finished=True)
    assert memory.steps("train") == [1, 2, 3, 4, 5]
    assert memory.steps("validation") == [4]
    assert memory.steps("start") == [0, 2]
    assert memory.opened == ["record", "record"]


def test_training_is_told_though_the_clock_of_the_next_node_is_behind(memory, folder):
    append(folder, "train", 1, time=1000.0)
    followed(folder).finish(finished=False)
    append(folder, "train", 2, time=990.0)
    followed(folder).finish(finished=False)
    assert memory.steps("train") == [1, 2]


def test_a_tracker_that_fails_is_told_once_and_tried_again_until_all_is_sent(memory, folder, monkeypatch):
    monkeypatch.setattr(follow, "RETRY_S", 0.0)
    told = []
    follower = followed(folder, told)
    memory.fails = lambda: len(told) == 0 or 1 < len(memory.opened) < 4
    for step in range(1, 7):
        append(folder, "train", step)
        follower.look()
    follower.finish(finished=False)
    assert memory.steps("train") == [1, 2, 3, 4, 5, 6]
    assert told == ["memory: the server is away; the run goes on, and tries again every 0 s"]


def test_between_two_attempts_a_tracker_is_left_alone(memory, folder):
    told = []
    follower = followed(folder, told)
    memory.fails = lambda: True
    for step in (1, 2, 3):
        append(folder, "train", step)
        follower.look()
    assert len(memory.opened) == 1


def test_what_is_not_sent_in_the_end_is_counted_and_the_next_process_sends_it(memory, folder):
    told = []
    memory.fails = lambda: True
    follower = followed(folder, told)
    for step in (1, 2, 3):
        append(folder, "train", step)
    follower.finish(finished=True)
    assert told[1:] == [
        f"memory: 3 events are not sent; they are in {folder}/metrics.jsonl, and "
        f"`hpc-supcon track {folder} log.to=memory` sends them"
    ]
    assert memory.files == []
    memory.fails = lambda: False
    followed(folder).finish(finished=True)
    assert memory.steps("train") == [1, 2, 3]


def test_a_batch_of_which_the_end_fails_is_sent_again_and_no_other(memory, folder, monkeypatch):
    monkeypatch.setattr(follow, "BATCH", 2)
    told = []
    for step in range(1, 6):
        append(folder, "train", step)
    memory.fails = lambda: len(memory.rows) == 2 and not told
    follower = followed(folder, told)
    follower.look()
    assert memory.steps("train") == [1, 2]
    assert read_state(folder, "memory").steps == {"train": 2}
    follower.finish(finished=False)
    assert memory.steps("train") == [1, 2, 3, 4, 5]


def test_a_record_that_is_gone_is_begun_again_with_everything(memory, folder):
    append(folder, "train", 1)
    followed(folder).finish(finished=False)

    def another(folder, config, state, tell):
        state.begin("another", "memory")
        memory.rows = []
        return memory

    TRACKERS["memory"] = TrackerSpec("memory", another)
    append(folder, "train", 2)
    followed(folder).finish(finished=False)
    assert memory.steps("train") == [1, 2]
    assert read_state(folder, "memory").id == "another"


def test_a_finished_run_sends_its_files_and_only_those_that_changed_when_it_is_done_again(memory, tmp_path):
    folder = full_run(tmp_path / "run")
    (folder / "plots").mkdir()
    (folder / "plots/confusion-linear.png").write_bytes(b"p")
    (folder / "report.html").write_text("page")
    followed(folder, artifacts=EVERYTHING).finish(finished=True)
    records = [("record", name) for name in ("config.yaml", "results.json", "scores.json", "metrics.jsonl")]
    assert memory.files == [
        *records, ("picture", "plots/confusion-linear.png"), ("page", "report.html"),
        ("checkpoint", "checkpoints/step-20"),
    ]  # fmt: skip
    assert [entry["probe"] for entry in memory.entries] == ["linear"]
    memory.files.clear()
    (folder / "report.html").write_text("another page")
    followed(folder, artifacts=EVERYTHING).finish(finished=True)
    assert memory.files == [("page", "report.html")]


@pytest.mark.parametrize("artifacts", [(), ("page",), ("pictures",)])
def test_files_that_are_not_chosen_are_not_sent(memory, tmp_path, artifacts):
    folder = full_run(tmp_path / "run")
    (folder / "report.html").write_text("page")
    followed(folder, artifacts=artifacts).finish(finished=True)
    assert {kind for kind, _ in memory.files} == {"record", *(("page",) if "page" in artifacts else ())}


def test_a_folder_that_is_not_a_run_yet_is_waited_for(memory, tmp_path):
    follower = followed(tmp_path / "run")
    follower.look()
    follower.finish(finished=True)
    assert memory.opened == []
    assert not (tmp_path / "run").exists()


def test_a_damaged_state_begins_a_new_record(memory, folder):
    append(folder, "train", 1)
    (folder / "tracking").mkdir()
    (folder / "tracking/memory.json").write_text('{"id": ')
    followed(folder).finish(finished=False)
    assert memory.steps("train") == [1]


def test_names_of_numbers_say_of_what_they_are():
    event = {
        "event": "probe", "step": 7, "time": 2.5, "probe": "linear", "test": {"accuracy": 0.5, "f1": None},
        "confusion": [[1]], "checkpoint": "step-7",
    }  # fmt: skip
    row = row_of(event)
    assert (row.kind, row.step, row.time) == ("probe/linear", 7, 2.5)
    assert row.numbers == {"probe/linear/test/accuracy": 0.5}
    assert row.texts == {"probe/linear/checkpoint": "step-7"}
    other = row_of({"event": "ood", "step": 7, "data": "image_folder:/a/../b c", "knn": {"auroc": 1}})
    assert other.numbers == {"ood/image_folder__a_.._b_c/knn/auroc": 1.0}


def test_a_missing_package_is_named_with_its_installation(monkeypatch, tmp_path):
    from hpc_supcon import tracking
    from hpc_supcon.errors import MissingExtra

    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"log\.to=wandb needs the package wandb: pip install 'hpc-supcon\[wandb\]'"
    ):
        check_trackers(["wandb"])


def test_a_folder_named_wandb_is_not_the_package(monkeypatch, tmp_path):
    from hpc_supcon import tracking
    from hpc_supcon.errors import MissingExtra

    (tmp_path / "nothing_of_this_name").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracking.TRACKERS, "w", TrackerSpec("nothing_of_this_name", tracking.TRACKERS["wandb"].open))
    with pytest.raises(MissingExtra):
        check_trackers(["w"])
