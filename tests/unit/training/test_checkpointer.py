"""The checkpointer: a failed save is an error on all ranks, and an error of one rank does not wait for the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hpc_supcon import checkpoint, run_folder
from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import RunFolderError
from hpc_supcon.training.checkpointer import Checkpointer
from tests.dist.ranks import run_ranks
from tests.dist.test_step import SETTINGS, build


def started(rank, world_size, folder, *more):
    """(state, checkpointer) of a run whose folder exists."""
    config = load_config("default", [*SETTINGS, f"run_dir={folder}", *more])
    state, _, _ = build(rank, world_size, [])
    if rank == 0:
        run_folder.create(Path(folder), config)
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    return state, Checkpointer(config, {"classes": ["a"]}, runtime)


def save_into_a_deleted_folder(rank, world_size, folder):
    state, checkpointer = started(rank, world_size, folder)
    if rank == 0:
        shutil.rmtree(folder)
    with pytest.raises(RunFolderError, match="was deleted or moved") as caught:
        checkpointer.save(state)
    return str(caught.value)


def test_a_save_that_fails_is_an_error_on_all_ranks(tmp_path):
    first, second = run_ranks(save_into_a_deleted_folder, 2, str(tmp_path / "r"))
    assert first == second


def fail_on_one_rank(rank, world_size, folder):
    state, checkpointer = started(rank, world_size, folder)
    state.step = 1
    checkpointer.save(state)
    if rank == 1:
        with pytest.raises(KeyError), checkpointer:  # the other rank does not come here at all
            raise KeyError
        return None
    checkpointer._writer.close()
    return checkpoint.list_steps(Path(folder) / "checkpoints")


def test_an_error_of_one_rank_leaves_the_block_without_the_others(tmp_path):
    assert run_ranks(fail_on_one_rank, 2, str(tmp_path / "r")) == [[1], None]


def last_save_fails(rank, world_size, folder):
    """The save fails in the background, so that only the end of the block can report it."""
    state, checkpointer = started(rank, world_size, folder, "checkpoint.max_failed_saves=3")
    if rank == 0:
        (Path(folder) / "checkpoints").touch()  # a file where the folder should be
    with pytest.raises(RunFolderError, match="checkpoint not written") as caught, checkpointer:
        checkpointer.save(state)
    return str(caught.value)


def test_a_last_save_that_fails_in_the_background_is_an_error_on_all_ranks_at_the_end(tmp_path):
    first, second = run_ranks(last_save_fails, 2, str(tmp_path / "r"))
    assert first == second


def test_a_snapshot_is_on_disk_when_its_function_returns_and_holds_the_description(tmp_path):
    state, checkpointer = started(0, 1, tmp_path / "r")
    state.step = 7
    save = checkpointer.snapshot(state)
    assert checkpoint.list_steps(tmp_path / "r" / "checkpoints") == []
    save()
    found = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoints" / "step-7")
    assert found.state["classes"] == ["a"]
    assert found.manifest["world_size"] == 1
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(found.tensors["model"][name], tensor)
    checkpointer.close()
