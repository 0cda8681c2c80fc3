"""results.json: entries that several processes add at once, and files that are no results."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from hpc_supcon.errors import RunFolderError
from hpc_supcon.run_folder import add_result, add_scores, check_results, check_still_there, read_scores
from tests.processes import FORK_SERVER


def add(folder, writer, count, start):
    start.wait()
    for i in range(count):
        add_result(folder, {"stage": "probe", "probe": f"{writer}-{i}"})


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.mark.parametrize("kind", [FORK_SERVER.Process, threading.Thread])
def test_no_entry_is_lost_when_several_add_at_once(tmp_path, kind):
    start = (FORK_SERVER if kind is FORK_SERVER.Process else threading).Event()
    writers = [kind(target=add, args=(tmp_path, writer, 20, start)) for writer in range(4)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join()
    assert sorted(entry["probe"] for entry in results(tmp_path)) == sorted(
        f"{w}-{i}" for w in range(4) for i in range(20)
    )
    assert not list(tmp_path.glob("*partial*"))


def test_an_entry_takes_the_place_of_an_earlier_one_of_the_same_probe(tmp_path):
    for accuracy in (0.1, 0.2):
        add_result(tmp_path, {"stage": "probe", "probe": "knn", "test": accuracy})
    assert results(tmp_path) == [{"stage": "probe", "probe": "knn", "test": 0.2}]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"results": 3}', '{"results": [3]}'])
def test_a_file_that_is_not_of_results_is_named_before_the_work_and_left_alone(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    for call in (lambda: check_results(tmp_path), lambda: add_result(tmp_path, {"stage": "probe"})):
        with pytest.raises(RunFolderError, match=r"results\.json: damaged, or not a file of results"):
            call()
    assert (tmp_path / "results.json").read_text() == content


def test_a_file_that_is_not_of_scores_is_named_before_the_work(tmp_path):
    (tmp_path / "scores.json").write_text('{"embedding": 3}')
    with pytest.raises(RunFolderError, match=r"scores\.json: damaged, or not a file of scores"):
        check_results(tmp_path)


def test_results_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(RunFolderError, match=r"results\.json: cannot be read: Is a directory"):
        check_results(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_folder_on_a_disk_that_fails_does_not_count_as_deleted(tmp_path, monkeypatch, number):
    with pytest.raises(RunFolderError, match="was deleted or moved"):
        check_still_there(tmp_path)

    def failing(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "is_file", failing)
    check_still_there(tmp_path)


def test_scores_of_other_sections_and_keys_are_kept(tmp_path):
    add_scores(tmp_path, "probes", "linear", {"a": 1})
    add_scores(tmp_path, "probes", "knn", {"a": 2})
    add_scores(tmp_path, "embedding", "encoder", {"b": 3})
    add_scores(tmp_path, "probes", "linear", {"a": 4})
    assert read_scores(tmp_path) == {
        "probes": {"linear": {"a": 4}, "knn": {"a": 2}},
        "embedding": {"encoder": {"b": 3}},
    }


def test_lists_of_numbers_are_on_one_line_each_and_texts_stay_as_they_are(tmp_path):
    odd = ["[\n 1,\n 2\n]", "[1, 2]", "a\\", "\udcff", "]", "["]
    scores = {"confusion": [[1, 2], [3, 4]], "classes": odd, "of": {odd[0]: [0.5, None, 1e-9]}, "none": [], "a": [{}]}
    add_scores(tmp_path, "probes", "linear", scores)
    assert read_scores(tmp_path)["probes"]["linear"] == scores
    lines = [line.strip() for line in (tmp_path / "scores.json").read_text().splitlines()]
    assert {"[1, 2],", "[3, 4]", '"none": [],'} <= set(lines)
    assert any(line.endswith(": [0.5, null, 1e-09]") for line in lines)


@pytest.mark.parametrize("text", ["[]", "{", '{"probes": 3}', "\udcff"])
def test_what_is_no_file_of_scores_is_named_and_kept(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunFolderError, match=r"scores\.json: damaged"):
        add_scores(tmp_path, "probes", "linear", {})
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")
