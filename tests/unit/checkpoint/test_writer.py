"""Saving while training goes on: the values of the save are written, failures are counted, and close waits."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.checkpoint.writer import CheckpointWriter, copy_to_host
from hpc_supcon.errors import RunFolderError


class Blocked:
    """A save that waits for `go`, then does the real one."""

    def __init__(self, folder):
        self.go, self.begun = threading.Event(), threading.Event()
        self.save = partial(checkpoint.save_checkpoint, folder, world_size=1, config_digest="d")
        self.threads = []

    def __call__(self, *args, **kwargs):
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.go.wait(60)
        return self.save(*args, **kwargs)


class Failing:
    """Fails at the given steps as a full disk does."""

    def __init__(self, *steps):
        self.steps, self.called = steps, []

    def __call__(self, step, tensors, state, *, protect=()):
        self.called.append(step)
        if step in self.steps:
            raise RunFolderError(f"step-{step}: full")


def writer(save, warnings=None, **settings):
    return CheckpointWriter(save, warn=(warnings if warnings is not None else []).append, **settings)


def test_changes_during_a_save_do_not_reach_the_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    state, blocked = {"classes": ["a"]}, Blocked(tmp_path)

    def train():
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()

    train()
    tensors = {
        "model": model.state_dict(),
        "optimizer": {str(i): optimizer.state[p]["momentum_buffer"] for i, p in enumerate(model.parameters())},
    }
    before = {stem: {k: t.clone() for k, t in named.items()} for stem, named in tensors.items()}
    with writer(blocked) as saving:
        saving.save(7, tensors, state)
        assert blocked.begun.wait(60)
        train()
        state["classes"].append("b")
        assert not torch.equal(tensors["model"]["0.weight"], before["model"]["0.weight"])
        blocked.go.set()
    found = checkpoint.load_checkpoint(tmp_path / "step-7")
    assert found.state == {"classes": ["a"], "step": 7}
    for stem, named in before.items():
        for name, t in named.items():
            assert torch.equal(found.tensors[stem][name], t)
    assert blocked.threads[0] is not threading.main_thread()


def test_the_copy_shares_no_memory_and_keeps_values_whatever_the_layout():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"a": {"x": x, "view": x[0, :, ::2], "empty": x[:0], "scalar": torch.tensor(3.0)}}
    copies = copy_to_host(tensors)
    for name, t in tensors["a"].items():
        copy = copies["a"][name]
        assert torch.equal(copy, t)
        assert copy.is_contiguous()
        assert not t.numel() or copy.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_a_second_save_waits_for_the_first_and_close_for_the_last(tmp_path):
    blocked = Blocked(tmp_path)
    saving = writer(blocked)
    saving.save(1, {}, {})
    threading.Timer(0.05, blocked.go.set).start()
    saving.save(2, {}, {})
    assert checkpoint.list_steps(tmp_path)[0] == 1
    saving.close()
    assert checkpoint.list_steps(tmp_path) == [1, 2]
    assert not any(thread.is_alive() for thread in blocked.threads)
    saving.close()


def test_a_synchronous_save_is_done_at_once_in_this_thread(tmp_path):
    blocked = Blocked(tmp_path)
    blocked.go.set()
    with writer(blocked, asynchronous=False) as saving:
        saving.save(1, {"model": {"w": torch.ones(2)}}, {})
        assert checkpoint.list_steps(tmp_path) == [1]
    assert blocked.threads == [threading.main_thread()]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_max_failed_failures_in_a_row_are_tolerated_and_one_more_is_an_error(asynchronous):
    save, warnings = Failing(1, 2, 4, 5, 6), []
    saving = writer(save, warnings, asynchronous=asynchronous, max_failed=2)

    def save_all():
        for step in range(1, 8):
            saving.save(step, {}, {})

    with pytest.raises(RunFolderError, match="step-6: full"):
        save_all()
    assert save.called == [1, 2, 3, 4, 5, 6]
    assert warnings == [
        f"failed save {n} of 2 that are tolerated: step-{s}: full"
        for s, n in zip((1, 2, 4, 5), (1, 2, 1, 2), strict=True)
    ]
    saving.close()


def test_with_none_tolerated_the_first_failure_is_the_error_of_the_next_save_or_close():
    def saved():
        saving = writer(Failing(1), max_failed=0)
        saving.save(1, {}, {})
        return saving

    for call in (lambda w: w.save(2, {}, {}), lambda w: w.close()):
        saving = saved()
        with pytest.raises(RunFolderError, match="step-1: full"):
            call(saving)
        saving.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_last_save_may_not_fail(asynchronous):
    warnings = []
    saving = writer(Failing(2), warnings, asynchronous=asynchronous, max_failed=5)
    saving.save(1, {}, {})
    saving.save(2, {}, {})
    with pytest.raises(RunFolderError, match="step-2: full"):
        saving.close()
    saving.close()


def test_after_another_error_the_pending_save_is_finished_and_its_failure_does_not_hide_the_error(tmp_path):
    blocked, warnings = Blocked(tmp_path), []

    def save_and_fail(save):
        with writer(save, warnings) as saving:
            saving.save(1, {}, {})
            blocked.go.set()
            raise KeyError

    with pytest.raises(KeyError):
        save_and_fail(blocked)
    assert checkpoint.list_steps(tmp_path) == [1]
    with pytest.raises(KeyError):
        save_and_fail(Failing(1))
    assert warnings == ["step-1: full"]


def test_a_bug_is_not_a_failed_save():
    def save(step, tensors, state, *, protect=()):
        raise TypeError("a bug")

    saving = writer(save, max_failed=9)
    saving.save(1, {}, {})
    with pytest.raises(TypeError, match="a bug"):
        saving.close()
