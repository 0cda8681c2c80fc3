"""SIGKILL before every system call of a save: the checkpoint that loads afterwards is complete and never older."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.checkpoint.layout import path_of
from hpc_supcon.checkpoint.load import problem_of
from hpc_supcon.errors import CheckpointCorrupt

from ..dist.ranks import run_ranks
from .injector import system_calls


def tensors(step, version=0):
    return {
        "model": {"w": torch.arange(6.0).view(2, 3) + step, "v": torch.tensor([version])},
        "rng": {"r": torch.arange(9, dtype=torch.uint8)},
    }


def save(folder, step, version=0):
    return checkpoint.save_checkpoint(
        folder, step, tensors(step, version), {}, world_size=1, config_digest="d", keep=2
    )


def first(folder):
    """The first save: afterwards there is no checkpoint, or the new one."""
    return 1, {None, (1, 1)}


def one_more(folder):
    """The save also deletes the oldest checkpoint."""
    for step in (1, 2):
        save(folder, step)
    return 3, {(2, 0), (3, 1)}


def the_same_step_again(folder):
    """Step 2 is replaced: the run never falls back to step 1."""
    for step in (1, 2):
        save(folder, step)
    return 2, {(2, 0), (2, 1)}


def replacing_a_damaged_one(folder):
    for step in (1, 2):
        save(folder, step)
    (folder / "step-2" / "rng.safetensors").write_bytes(b"damaged")
    return 2, {(1, 0), (2, 1)}


def after_an_earlier_kill(folder):
    """Earlier saves were killed while they wrote, deleted and replaced a checkpoint."""
    for step in (1, 2):
        save(folder, step)
    shutil.copytree(folder / "step-1", folder / ".partial-step-9")
    shutil.copytree(folder / "step-1", folder / ".deleted-step-0")
    (folder / ".deleted-step-0" / "manifest.json").unlink()
    (folder / "step-2").rename(folder / ".replaced-step-2")
    return 3, {(2, 0), (3, 1)}


@pytest.fixture
def memory(tmp_path):
    """A folder in memory if possible: these are hundreds of saves, each with many calls of fsync."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


SCENARIOS = [first, one_more, the_same_step_again, replacing_a_damaged_one, after_an_earlier_kill]


def killed_at(n, half, act):
    """Run `act` in a child process that kills itself before its n-th call; False if it completed."""
    child = os.fork()
    if child == 0:
        count = 0

        def before(name, args):
            nonlocal count
            count += 1
            if count == n:
                if half and name == "write":
                    os.pwrite(args[0], args[1][: len(args[1]) // 2], os.lseek(args[0], 0, os.SEEK_CUR))
                os.kill(os.getpid(), signal.SIGKILL)

        with system_calls(before):
            act()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def newest(folder):
    try:
        found, _ = checkpoint.load_newest(folder)
    except CheckpointCorrupt as error:
        return str(error)
    if found is None:
        return None
    step, version = found.state["step"], int(found.tensors["model"]["v"])
    for stem, named in tensors(step, version).items():
        for name, t in named.items():
            assert torch.equal(found.tensors[stem][name], t)
    return step, version


def damaged(folder):
    """Steps that are listed but do not verify."""
    return {step for step in checkpoint.list_steps(folder) if problem_of(path_of(folder, step))}


def check_next_save(folder, step):
    """The next save succeeds and leaves no temporary folders."""
    save(folder, step, 2)
    assert newest(folder) == (step, 2)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def kill_everywhere(rank, world, scenario, root):
    """Kill a save at every moment; returns its system calls, and the moments after which a wrong checkpoint loads."""
    step, allowed = scenario(Path(root, "before"))
    calls, wrong = [], []
    Path(root, "before").mkdir(exist_ok=True)
    shutil.copytree(Path(root, "before"), Path(root, "whole"))
    with system_calls(lambda name, args: calls.append(name)):
        save(Path(root, "whole"), step, 1)
    moments = [(n, False) for n in range(1, len(calls) + 2)]
    moments += [(n, True) for n, name in enumerate(calls, 1) if name == "write"]
    for n, half in moments:
        folder = Path(root) / f"{n}-{half}"
        shutil.copytree(Path(root, "before"), folder)
        killed = killed_at(n, half, lambda folder=folder: save(folder, step, 1))
        assert killed == (n <= len(calls))
        found = newest(folder)
        if found not in (allowed if killed else {(step, 1)}) or damaged(folder) - damaged(Path(root, "before")):
            wrong.append((n, half, found, damaged(folder)))
        check_next_save(folder, step + 1)
        shutil.rmtree(folder)
    return calls, wrong


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_killed_at_any_system_call_leaves_the_old_or_the_new_checkpoint(memory, scenario):
    calls, wrong = run_ranks(kill_everywhere, 1, scenario, str(memory))[0]
    assert wrong == []
    assert {"open", "write", "fsync", "rename"} <= set(calls), "the calls are not intercepted"


def kill_twice(rank, world, root):
    rng, wrong = random.Random(0), []
    before = Path(root, "before")
    step, allowed = the_same_step_again(before)
    for trial in range(60):
        folder = Path(root, str(trial))
        shutil.copytree(before, folder)
        for version in (1, 1):
            killed_at(rng.randrange(1, 40), rng.random() < 0.5, lambda f=folder, s=step, v=version: save(f, s, v))
            if (found := newest(folder)) not in allowed:
                wrong.append((trial, found))
        check_next_save(folder, step + 1)
    return wrong


def test_a_save_may_be_killed_while_it_repairs_what_an_earlier_kill_left(memory):
    assert run_ranks(kill_twice, 1, str(memory)) == [[]]


def test_everything_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path):
    save(tmp_path, 1)
    opened, events = {}, []

    def before(name, args):
        if name == "open":
            events.append(("open", Path(args[0]).name))
        elif name in ("fsync", "write"):
            opened[args[0]] = Path(f"/proc/self/fd/{args[0]}").readlink().name
            events.append((name, opened[args[0]]))
        elif name == "rename":
            events.append(("rename", Path(args[1]).name))

    with system_calls(before):
        save(tmp_path, 2)
    at = events.index(("rename", "step-2"))
    for name in ("model.safetensors", "rng.safetensors", "state.json", "manifest.json"):
        last_write = max(i for i, e in enumerate(events) if e == ("write", name))
        assert last_write < events.index(("fsync", name)) < events.index(("fsync", ".partial-step-2")) < at
    assert ("fsync", tmp_path.name) in events[at:]
