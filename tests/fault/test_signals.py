"""Preemption by a signal: all ranks save at the same step and exit with code 75, and no step is lost."""

from __future__ import annotations

import pytest

from hpc_supcon import checkpoint
from hpc_supcon.errors import Preempted

from .runs import STEPS, events, hashes, newest, run, steps

PREEMPTED = Preempted.exit_code
# validates after every third step, and keeps the best of these
VALIDATION = (
    "validation.every_steps=3",
    "train.stopping={monitor: loss, patience: 50, min_change: 0.0, target: null}",
)


def resume_and_compare(ranks, folder, whole, *more):
    stderr = run(ranks, folder, *more, "--resume")
    assert hashes(folder) == hashes(whole)
    assert steps(folder) == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    return stderr


@pytest.mark.parametrize(
    ("ranks", "fault", "name"),
    [
        (1, "usr2@step=9", "SIGUSR2"),
        (2, "term@rank=1,step=9", "SIGTERM on rank 1"),
        (2, "usr2@rank=0,step=9;usr2@rank=1,step=9", "SIGUSR2"),
        (4, "usr2@rank=3,step=9;term@rank=1,step=10", "rank"),
    ],
)
def test_a_signal_to_any_rank_makes_all_save_at_one_step_and_loses_no_step(
    tmp_path, uninterrupted, ranks, fault, name
):
    folder = tmp_path / "r"
    stderr = run(ranks, folder, fault=fault, code=PREEMPTED)
    saved = newest(folder)
    assert steps(folder) == list(range(1, saved + 1))
    assert 9 <= saved < STEPS, "the signal came too late for this test"
    assert [e["step"] for e in events(folder, "preempted")] == [saved]
    assert f"saved at step {saved}; start again with --resume" in stderr
    assert name in stderr
    assert "error" not in stderr
    assert f"going on from step {saved}" in resume_and_compare(ranks, folder, uninterrupted(ranks))


def test_signals_while_saving_change_nothing(tmp_path, uninterrupted):
    """The first one preempts the run; the others arrive during that save, and during a save in the background."""
    folder = tmp_path / "r"
    fault = "usr2@step=14,phase=write;term@step=14,phase=fsync,call=3;usr2@step=14,phase=rename"
    fault += ";term@step=14,phase=save,call=0"
    run(2, folder, fault=fault, code=PREEMPTED)
    assert newest(folder) >= 14
    resume_and_compare(2, folder, uninterrupted(2))


def test_a_run_can_be_preempted_twice(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    run(2, folder, fault="usr2@rank=1,step=3", code=PREEMPTED)
    first = newest(folder)
    run(2, folder, "--resume", fault=f"usr2@rank=0,step={first + 2}", code=PREEMPTED)
    assert first < newest(folder) < STEPS
    resume_and_compare(2, folder, uninterrupted(2))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_validation_saves_the_state_before_it_at_once(tmp_path, uninterrupted, ranks):
    """Here the validation hangs: the step before it is saved, and is validated when the run resumes."""
    folder, whole = tmp_path / "r", uninterrupted(ranks, *VALIDATION)
    last = ranks - 1
    stderr = run(
        ranks,
        folder,
        *VALIDATION,
        fault=f"usr2@rank={last},step=9,phase=validation;hang@rank=0,step=9,phase=validation",
        code=PREEMPTED,
    )
    assert newest(folder) == 9
    assert "validation): saved at step 9" in stderr
    assert steps(folder, "validation") == [3, 6]
    resume_and_compare(ranks, folder, whole, *VALIDATION)
    assert steps(folder, "validation") == list(range(3, STEPS + 1, 3))

    def losses(folder):
        return [(e["step"], e["loss"]) for e in events(folder, "validation")]

    def state(folder):
        return checkpoint.load_checkpoint(folder / "checkpoints" / f"step-{STEPS}").state

    assert losses(folder) == losses(whole)
    assert state(folder) == state(whole)


def test_a_validation_that_a_preemption_skipped_runs_on_resume(tmp_path, uninterrupted):
    """The signal arrives so that the last common step is one to validate after."""
    whole = uninterrupted(1, *VALIDATION)
    folder = tmp_path / "r"
    run(1, folder, *VALIDATION, fault="usr2@step=6", code=PREEMPTED)
    assert newest(folder) == 6
    assert steps(folder, "validation") == [3]
    resume_and_compare(1, folder, whole, *VALIDATION)
    assert steps(folder, "validation") == steps(whole, "validation")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_the_first_step_ends_the_run_at_once(tmp_path, uninterrupted, ranks):
    """The first step may take minutes, with torch.compile."""
    folder = tmp_path / "r"
    stderr = run(ranks, folder, fault=f"usr2@rank={ranks - 1},step=1;hang@step=1", code=PREEMPTED)
    assert "first step): nothing to save" in stderr
    assert checkpoint.list_steps(folder / "checkpoints") == []
    resume_and_compare(ranks, folder, uninterrupted(ranks))


def test_a_signal_during_the_probes_ends_the_run_at_once(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    stderr = run(2, folder, stage="run", fault="term@rank=1,phase=probe;hang@phase=probe", code=PREEMPTED)
    assert "nothing to save" in stderr
    assert hashes(folder) == hashes(uninterrupted(2))
    assert not (folder / "results.json").exists()
    run(2, folder, "--resume", "probe.kind=knn", stage="run")
    assert (folder / "results.json").exists()
