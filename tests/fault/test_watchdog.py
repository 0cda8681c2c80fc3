"""A rank that hangs, is stopped or is lost ends all ranks, whose stacks are on disk; no process survives."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hpc_supcon.distributed import watch_threads
from hpc_supcon.distributed.store import neighbor, who
from hpc_supcon.distributed.watch import Watch
from hpc_supcon.errors import RankLost

from .runs import Run, hashes, run
from .torchrun import Torchrun

LOST = RankLost.exit_code
LIMIT_S = 6
LIMITS = (f"runtime.timeout_s={LIMIT_S}", "runtime.first_step_timeout_s=120")


def stacks(folder):
    return {path.name: path.read_text() for path in (folder / "stacks").iterdir()}


def test_a_stopped_rank_ends_all_four_and_every_stack_is_on_disk(tmp_path):
    """The stopped one too: it is woken up to write its stack."""
    it = Run(4, tmp_path / "r", *LIMITS, fault="stop@rank=2,step=9")
    assert it.end(within_s=LIMIT_S + 60) == [LOST] * 4, it.said
    found = stacks(tmp_path / "r")
    assert set(found) == {f"rank-{rank}.txt" for rank in range(4)}
    for text in found.values():
        assert "training: step 9 took over 6 s" in text or "gave no sign of life" in text
        assert "Current thread" in text
        assert "train_step" in text, "the main thread's stack says where it hangs"
    assert "all ranks end; stacks: " in it.said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_ends_both(tmp_path, rank):
    it = Run(2, tmp_path / "r", *LIMITS, fault=f"hang@rank={rank},step=9")
    assert it.end(within_s=LIMIT_S + 60) == [LOST] * 2, it.said
    found = stacks(tmp_path / "r")
    assert "injector.py" in found[f"rank-{rank}.txt"]
    assert "injector.py" in found[f"rank-{1 - rank}.txt"]
    assert f"line {line_of('threading.Event().wait()')} in strike" in found[f"rank-{rank}.txt"]


def line_of(text):
    from . import injector

    lines = Path(injector.__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_its_stack_and_the_run_goes_on_later(tmp_path, uninterrupted, rank):
    it = Run(2, tmp_path / "r", *LIMITS, fault=f"kill@rank={rank},step=9")
    codes = it.end(within_s=LIMIT_S + 60)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == LOST, it.said
    assert "train_step" in stacks(tmp_path / "r")[f"rank-{1 - rank}.txt"]
    assert f"rank {1 - rank}: " in it.said
    assert "start again with --resume" in it.said
    run(2, tmp_path / "r", "--resume")
    assert hashes(tmp_path / "r") == hashes(uninterrupted(2))


def test_a_process_alone_that_hangs_in_a_step_ends_but_in_validation_it_may_take_its_time(tmp_path):
    it = Run(1, tmp_path / "r", *LIMITS, "validation.every_steps=4", fault="hang@step=6")
    assert it.end(within_s=LIMIT_S + 60) == [LOST]
    assert "training: step 6 took over 6 s" in it.said
    watch = Watch(tmp_path, step_s=1.0, first_step_s=9.0)
    with watch.training():
        assert watch.phase_now.limit_s == 9
        watch.edge(1)
        assert watch.phase_now.limit_s == 1
        for name in ("validation", "saving"):
            with watch.phase(name):
                assert watch.phase_now.limit_s is None
        assert watch.phase_now.limit_s == 1
    assert watch.phase_now.limit_s is None


def test_seconds_in_which_the_whole_process_was_suspended_do_not_count(monkeypatch):
    now = 100.0
    monkeypatch.setattr(watch_threads.time, "monotonic", lambda: now)
    clock = watch_threads._Clock()
    idle = watch_threads._Idle(clock)
    assert idle.of(5) == 0
    for later in (101.0, 102.0, 5000.0, 5001.0):
        now = later
        clock.tick()
    assert idle.of(5) == 1 + 1 + 2 + 1
    assert idle.of(6) == 0


def test_a_neighbor_is_known_by_more_than_its_number():
    host, pid, began = who().split()
    assert neighbor(who()) == os.getpid()
    assert neighbor(f"{host} {pid} {int(began) - 1}") is None, "another process that had the number"
    assert neighbor(f"elsewhere {pid} {began}") is None
    assert neighbor(f"{host} 999999999 {began}") is None
    assert neighbor(f"{host} {pid} ?") is None


def test_under_torchrun_a_stopped_worker_does_not_survive(tmp_path):
    """torchrun itself would wait 30 s before it kills a worker that does not hear SIGTERM."""
    it = Torchrun(2, tmp_path / "r", *LIMITS, fault="stop@rank=1,step=9")
    assert it.end() == 1
    assert it.survivors() == []
    assert set(stacks(tmp_path / "r")) == {"rank-0.txt", "rank-1.txt"}
    assert f"exitcode  : {LOST}" in it.said


def test_when_torchrun_is_killed_no_worker_survives(tmp_path):
    it = Torchrun(2, tmp_path / "r", "train.epochs=10000", "checkpoint.every_steps=50", *LIMITS)
    it.wait_for_a_checkpoint()
    it.process.kill()
    it.process.wait()
    it.wait_until_none_survives()
    assert "torchrun was killed" in it.said or "was lost" in it.said
