"""Asked to leave by a signal: all ranks save at the same step, end with code 75, and no step is lost."""

from __future__ import annotations

import pytest

from hpc_supcon import checkpoint
from hpc_supcon.distributed import preemption

from .runs import STEPS, events, hashes, newest, run, steps

LEFT = preemption.EXIT_CODE
# the run is validated after every third step; the best step is one of them
VALIDATING = (
    "validation.every_steps=3",
    "train.stopping={monitor: loss, patience: 50, min_change: 0.0, target: null}",
)


def resume_and_compare(ranks, folder, whole, *more):
    said = run(ranks, folder, *more, "--resume")
    assert hashes(folder) == hashes(whole)
    assert steps(folder) == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    return said


@pytest.mark.parametrize(
    ("ranks", "fault", "name"),
    [
        (1, "usr2@step=9", "SIGUSR2"),
        (2, "term@rank=1,step=9", "SIGTERM on rank 1"),
        (2, "usr2@rank=0,step=9;usr2@rank=1,step=9", "SIGUSR2"),
        (4, "usr2@rank=3,step=9;term@rank=1,step=10", "rank"),
    ],
)
def test_a_signal_to_any_rank_has_all_save_at_one_step_and_loses_none(tmp_path, uninterrupted, ranks, fault, name):
    folder = tmp_path / "r"
    said = run(ranks, folder, fault=fault, code=LEFT)
    left = newest(folder)
    assert steps(folder) == list(range(1, left + 1))
    assert 9 <= left < STEPS, "the signal came too late to prove anything"
    assert [e["step"] for e in events(folder, "left")] == [left]
    assert f"saved at step {left}; start again with --resume" in said
    assert name in said
    assert "error" not in said
    assert f"going on from step {left}" in resume_and_compare(ranks, folder, uninterrupted(ranks))


def test_signals_while_saving_change_nothing(tmp_path, uninterrupted):
    """The first makes it leave; others come in the middle of that save, and of a save in the background."""
    folder = tmp_path / "r"
    fault = "usr2@step=14,phase=write;term@step=14,phase=fsync,call=3;usr2@step=14,phase=rename"
    fault += ";term@step=14,phase=save,call=0"
    run(2, folder, fault=fault, code=LEFT)
    assert newest(folder) >= 14
    resume_and_compare(2, folder, uninterrupted(2))


def test_twice_in_a_row(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    run(2, folder, fault="usr2@rank=1,step=3", code=LEFT)
    first = newest(folder)
    run(2, folder, "--resume", fault=f"usr2@rank=0,step={first + 2}", code=LEFT)
    assert first < newest(folder) < STEPS
    resume_and_compare(2, folder, uninterrupted(2))


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_the_middle_of_validation_the_state_before_it_is_saved_at_once(tmp_path, uninterrupted, ranks):
    """A validation that never ends: the step before it is saved, and validated when the run is resumed."""
    folder, whole = tmp_path / "r", uninterrupted(ranks, *VALIDATING)
    last = ranks - 1
    fault = f"usr2@rank={last},step=9,phase=validation;hang@rank=0,step=9,phase=validation"
    said = run(ranks, folder, *VALIDATING, fault=fault, code=LEFT)
    assert newest(folder) == 9
    assert "validation): saved at step 9" in said
    assert steps(folder, "validation") == [3, 6]
    resume_and_compare(ranks, folder, whole, *VALIDATING)
    assert steps(folder, "validation") == list(range(3, STEPS + 1, 3))

    def seen(folder):
        return [(e["step"], e["loss"]) for e in events(folder, "validation")]

    def state(folder):
        return checkpoint.load_checkpoint(folder / "checkpoints" / f"step-{STEPS}").state

    assert seen(folder) == seen(whole)
    assert state(folder) == state(whole)


def test_a_validation_that_was_skipped_by_leaving_is_done_on_resume(tmp_path, uninterrupted):
    """The run is asked to leave so that its last step is one to validate."""
    whole = uninterrupted(1, *VALIDATING)
    folder = tmp_path / "r"
    run(1, folder, *VALIDATING, fault="usr2@step=6", code=LEFT)
    assert newest(folder) == 6
    assert steps(folder, "validation") == [3]
    resume_and_compare(1, folder, whole, *VALIDATING)
    assert steps(folder, "validation") == steps(whole, "validation")


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_the_first_step_it_leaves_at_once(tmp_path, uninterrupted, ranks):
    """As in a compilation, which may take minutes."""
    folder = tmp_path / "r"
    said = run(ranks, folder, fault=f"usr2@rank={ranks - 1},step=1;hang@step=1", code=LEFT)
    assert "first step): nothing was left to save" in said
    assert checkpoint.list_steps(folder / "checkpoints") == []
    resume_and_compare(ranks, folder, uninterrupted(ranks))


def test_in_the_probes_it_leaves_at_once(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    said = run(2, folder, stage="run", fault="term@rank=1,phase=probe;hang@phase=probe", code=LEFT)
    assert "nothing was left to save" in said
    assert hashes(folder) == hashes(uninterrupted(2))
    assert not (folder / "results.json").exists()
    run(2, folder, "--resume", "probe.kind=knn", stage="run")
    assert (folder / "results.json").exists()
