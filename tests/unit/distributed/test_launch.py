"""Environment variables become a rank, or a named error: never silently a single process."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from hpc_supcon import allocator
from hpc_supcon.bench.common import resident
from hpc_supcon.distributed import launch
from hpc_supcon.distributed.devices import choose_device
from hpc_supcon.distributed.launch import Launch, fair_threads
from hpc_supcon.errors import ConfigError, LaunchError
from tests.dist.ranks import run_ranks
from tests.processes import Ranks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_JOB_NODELIST": "gpu7",
}  # fmt: skip


def test_an_empty_environment_is_one_process():
    assert launch.resolve({}) == launch.Launch()
    assert launch.resolve({"MASTER_ADDR": "x", "MASTER_PORT": "1", "SLURM_JOB_ID": "3"}).world_size == 1


def test_torchrun_is_read():
    found = launch.resolve(TORCHRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert (found.master_addr, found.master_port, found.launcher) == ("node7", 29500, "torchrun")


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_partial_torchrun_environment_names_what_is_missing(missing):
    env = {k: v for k, v in TORCHRUN.items() if k != missing}
    with pytest.raises(LaunchError, match=f"{missing} not"):
        launch.resolve(env)


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "4"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"LOCAL_RANK": "2"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_WORLD_SIZE": "5"},
    ],
)
def test_an_impossible_rank_is_refused(change):
    with pytest.raises(LaunchError):
        launch.resolve({**TORCHRUN, **change})


def test_srun_is_read_with_uneven_nodes():
    found = launch.resolve(SRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (4, 5, 1, 2)
    assert (found.master_addr, found.launcher) == ("gpu7", "slurm")
    assert found.master_port == 15000 + 4711
    other = launch.resolve({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert (other.local_world_size, other.master_port) == (3, found.master_port)


def test_the_node_list_is_read_by_scontrol(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch.resolve({**SRUN, "SLURM_JOB_NODELIST": "n[3-4]"}).master_addr == "n3"
    with pytest.raises(LaunchError, match="failed"):
        launch.resolve({**SRUN, "SLURM_JOB_NODELIST": "n[5-6]"})
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="export MASTER_ADDR"):
        launch.resolve({**SRUN, "SLURM_JOB_NODELIST": "n[3-4]"})


def test_a_batch_script_without_srun_is_refused_when_it_asked_for_several_tasks():
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    with pytest.raises(LaunchError, match="srun"):
        launch.resolve(batch)
    assert launch.resolve({**batch, "SLURM_NTASKS": "1"}).world_size == 1


def test_torchrun_inside_a_step_wins_but_a_bare_contradiction_is_refused():
    inside = {**SRUN, **TORCHRUN}
    assert launch.resolve({**inside, "TORCHELASTIC_RUN_ID": "none"}).rank == 3
    with pytest.raises(LaunchError, match="contradicts"):
        launch.resolve(inside)


def test_a_partial_slurm_step_is_refused():
    for missing in ("SLURM_LOCALID", "SLURM_JOB_NODELIST"):
        with pytest.raises(LaunchError, match=missing):
            launch.resolve({k: v for k, v in SRUN.items() if k != missing})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_rank_without_world_size_ends_with_code_2_and_one_line(tmp_path):
    alone = Ranks(["run", f"run_dir={tmp_path}/r"], tmp_path / "stderr", environment={"RANK": 0})
    assert alone.end() == [2]
    assert alone.stderr.count("\n") == 1
    assert "WORLD_SIZE" in alone.stderr
    assert not (tmp_path / "r").exists()


def memory_after_freeing(rank, world_size, kept):
    """Bytes that a freed tensor of 200 MB leaves with this process: before and after all is released."""
    with launch.start(device="cpu", reuse_memory=kept):
        before = resident("VmRSS")
        x = torch.ones(50_000_000)
        del x
        after = resident("VmRSS") - before
        allocator.release_freed_memory()
        return after, resident("VmRSS") - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_stays_with_the_process_where_that_is_asked_for(kept):
    ((after, released),) = run_ranks(memory_after_freeing, 1, kept)
    assert (after > 150_000_000) is kept
    assert released < 50_000_000


@pytest.mark.parametrize(
    ("launch", "env", "cores", "threads"),
    [
        (Launch(), {}, 8, 8),
        (Launch(), {"OMP_NUM_THREADS": "1"}, 8, 8),  # set by torchrun, on any machine
        (Launch(), {"HPC_SUPCON_CONCURRENT_RUNS": "3"}, 8, 2),
        (Launch(), {"HPC_SUPCON_CONCURRENT_RUNS": "30"}, 8, 1),
        (Launch(0, 2, 0, 2, launcher="torchrun"), {}, 8, 4),
        (Launch(0, 2, 0, 2, launcher="torchrun"), {"HPC_SUPCON_CONCURRENT_RUNS": "2"}, 8, 2),
        # a node of 96 cores: srun bound the task to its 12; Slurm does not bind; srun was not told how many
        (Launch(0, 8, 0, 8, launcher="slurm"), {"SLURM_CPUS_PER_TASK": "12", "SLURM_CPUS_ON_NODE": "96"}, 12, 12),
        (Launch(0, 8, 0, 8, launcher="slurm"), {"SLURM_CPUS_PER_TASK": "12", "SLURM_CPUS_ON_NODE": "96"}, 96, 12),
        (Launch(0, 8, 0, 8, launcher="slurm"), {"SLURM_CPUS_ON_NODE": "96"}, 12, 12),
        (Launch(0, 8, 0, 8, launcher="slurm"), {"SLURM_CPUS_ON_NODE": "96"}, 96, 12),
        (Launch(launcher="slurm"), {"SLURM_CPUS_PER_TASK": "6", "HPC_SUPCON_CONCURRENT_RUNS": "3"}, 96, 2),
    ],
)
def test_each_rank_takes_its_share_of_the_cores(launch, env, cores, threads):
    assert fair_threads(launch, env, cores) == threads
