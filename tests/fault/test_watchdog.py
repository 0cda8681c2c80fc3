"""A rank that hangs, is stopped or is lost ends all ranks. Their stacks are on disk, and no process survives."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hpc_supcon.errors import RankLost

from .injector import TIMEOUT_S
from .runs import STEPS, Run, hashes, run
from .torchrun import Torchrun

LOST = RankLost.exit_code
STEP = 9


def with_timeout(fault, ranks, step=STEP):
    """The fault, and a short timeout of all ranks for the step in which it happens."""
    return ";".join([*(f"timeout@rank={rank},step={step}" for rank in range(ranks)), f"{fault},step={step}"])


def stacks(folder):
    return {path.name: path.read_text() for path in (folder / "stacks").iterdir()}


def test_a_stopped_rank_ends_all_four_and_every_stack_is_on_disk(tmp_path):
    """The stopped rank is woken up to write its own."""
    it = Run(4, tmp_path / "r", fault=with_timeout("stop@rank=2", 4))
    assert it.end() == [LOST] * 4, it.stderr
    found = stacks(tmp_path / "r")
    assert set(found) == {f"rank-{rank}.txt" for rank in range(4)}
    for rank in range(4):
        text = found[f"rank-{rank}.txt"]
        assert f"training: step {STEP} took over {TIMEOUT_S} s" in text or "gave no sign of life" in text
        assert "Current thread" in text
        assert "fit.py" in text, "the stack of the main thread"
        assert rank == 2 or "train_step" in text, "the others wait for the stopped rank in its step"
    assert "all ranks end; stacks: " in it.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_ends_both(tmp_path, rank):
    it = Run(2, tmp_path / "r", fault=with_timeout(f"hang@rank={rank}", 2))
    assert it.end() == [LOST] * 2, it.stderr
    found = stacks(tmp_path / "r")
    assert "injector.py" in found[f"rank-{rank}.txt"]
    assert "injector.py" in found[f"rank-{1 - rank}.txt"]
    assert f"line {line_of('threading.Event().wait()')} in inject" in found[f"rank-{rank}.txt"]


def line_of(text):
    from . import injector

    lines = Path(injector.__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_its_stack_and_the_run_can_be_resumed(tmp_path, uninterrupted, rank):
    it = Run(2, tmp_path / "r", fault=f"kill@rank={rank},step={STEP}")
    codes = it.end()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == LOST, it.stderr
    assert "train_step" in stacks(tmp_path / "r")[f"rank-{1 - rank}.txt"]
    assert f"rank {1 - rank}: " in it.stderr
    assert "start again with --resume" in it.stderr
    run(2, tmp_path / "r", "--resume")
    assert hashes(tmp_path / "r") == hashes(uninterrupted(2))


def test_a_single_process_that_hangs_in_a_step_ends(tmp_path):
    limits = ("runtime.timeout_s=6", "runtime.first_step_timeout_s=120")
    it = Run(1, tmp_path / "r", *limits, "validation.every_steps=4", fault="hang@step=6")
    assert it.end() == [LOST]
    assert "training: step 6 took over 6 s" in it.stderr


def test_under_torchrun_a_stopped_worker_does_not_survive(tmp_path):
    """Stopped before its last step: when it is woken up, it must end, and not complete the run.

    torchrun itself would wait 30 s before it kills a worker that does not react to SIGTERM.
    """
    it = Torchrun(2, tmp_path / "r", fault=with_timeout("stop@rank=1", 2, step=STEPS))
    assert it.end() == 1
    assert it.survivors() == []
    assert set(stacks(tmp_path / "r")) == {"rank-0.txt", "rank-1.txt"}
    assert f"exitcode  : {LOST}" in it.stderr


def test_when_torchrun_is_killed_no_worker_survives(tmp_path):
    it = Torchrun(2, tmp_path / "r", "train.epochs=10000", "checkpoint.every_steps=50")
    it.wait_for_a_checkpoint()
    it.process.kill()
    it.process.wait()
    it.wait_until_none_survives()
    assert "torchrun was killed" in it.stderr or "was lost" in it.stderr
