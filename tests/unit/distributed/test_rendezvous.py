"""The ranks of a run find each other and nobody else; where they cannot, every rank says so at once."""

from __future__ import annotations

import os
import random
import socket
import sys

import pytest
import torch
import torch.distributed as dist

from hpc_supcon import cli
from hpc_supcon.distributed import launch, rendezvous
from hpc_supcon.distributed.collectives import all_sum
from hpc_supcon.environment import port_of_job
from hpc_supcon.errors import LaunchError, RanksApart
from tests.processes import FORK_SERVER, RUN_TIMEOUT_S, _run


def slurm(rank, world_size, job, step=0, **more):
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0,
        "SLURM_STEP_NUM_TASKS": world_size, "SLURM_STEP_TASKS_PER_NODE": world_size,
        "SLURM_STEP_NODELIST": "127.0.0.1", **more,
    }  # fmt: skip


def by_hand(rank, world_size, port, **more):
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}


class Started:
    """A process for each environment, all running `main`; each writes to its own file."""

    def __init__(self, folder, environments, arguments=(), main=cli.main):
        self._files = [folder / f"stderr-{i}" for i in range(len(environments))]
        self._processes = []
        for environment, file in zip(environments, self._files, strict=True):
            process = FORK_SERVER.Process(target=_run, args=(list(arguments), environment, str(file), main))
            process.start()
            self._processes.append(process)

    def end(self):
        """[(exit code, what it wrote)]"""
        for process in self._processes:
            process.join(RUN_TIMEOUT_S)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return [(code, file.read_text()) for code, file in zip(codes, self._files, strict=True)]


def add_up():
    """The sum over ranks of a number of the run and the rank."""
    rendezvous.ANSWER_TIMEOUT_S = 0.3
    with launch.start(device="cpu", threads=1) as runtime:
        total = all_sum(torch.tensor(int(os.environ["SLURM_JOB_ID"]) + runtime.rank))
        sys.stderr.write(str(int(total)))


def impatient():
    """The command line, with short limits."""
    rendezvous.OCCUPIED_S, rendezvous.ANSWER_TIMEOUT_S = 0.5, 0.2
    cli.main()


def test_the_steps_of_a_job_and_its_neighbors_have_ports_of_their_own():
    found = {launch.resolve({k: str(v) for k, v in slurm(0, 2, 4711, step).items()}) for step in range(40)}
    assert {one.master_port for one in found} == {port_of_job(4711, step) for step in range(40)}
    assert len({one.master_port for one in found} | {port_of_job(job) for job in range(4712, 4812)}) == 140
    assert len({one.run for one in found}) == 40
    restarted = launch.resolve({k: str(v) for k, v in slurm(0, 2, 4711, SLURM_RESTART_COUNT=1).items()})
    assert restarted.run not in {one.run for one in found}


def test_two_steps_whose_ports_are_the_same_do_not_meet(tmp_path):
    # three runs, one of them of another job: all start from one port, on which something else listens, too
    job = random.randrange(10**6)
    jobs = [job, job + 17000, job + 34000]
    assert len({port_of_job(j) for j in jobs}) == 1
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port_of_job(job)))
            other.listen()
        except OSError:
            pass  # occupied by something else already
        ended = Started(tmp_path, [slurm(rank, 2, j) for j in jobs for rank in (1, 0)], main=add_up).end()
    assert ended == [(0, str(2 * j + 1)) for j in jobs for _ in range(2)]


@pytest.mark.parametrize("start", [by_hand, slurm])
def test_an_occupied_master_port_is_told_on_every_rank_in_one_line(tmp_path, start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        given = {"MASTER_PORT": port} if start is slurm else {}
        ranks = [start(rank, 2, 5 if start is slurm else port, **given) for rank in range(2)]
        arguments = ["pretrain", "quickstart", f"run_dir={tmp_path}/r"]
        ended = Started(tmp_path, ranks, arguments, impatient).end()
    for code, text in ended:
        assert (code, text.count("\n")) == (2, 1), text
        assert f"127.0.0.1:{port}" in text
        assert "occupied by another program or run" in text
        assert "export MASTER_PORT" in text
    assert not (tmp_path / "r").exists()


def test_two_runs_that_were_given_one_port_are_told_on_every_rank(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # rank 2 is still to come, so that both processes that are rank 1 meet rank 0
    ended = Started(
        tmp_path, [by_hand(rank, 3, port) for rank in (0, 1, 1)], ["pretrain", "quickstart", "data.batch_size=510"]
    ).end()
    for code, text in ended:
        assert (code, text.count("\n")) == (2, 1), text
        assert f"two processes are rank 1 of 3 at 127.0.0.1:{port}" in text


def test_a_host_that_does_not_exist_is_named_on_every_rank(tmp_path):
    ranks = [by_hand(rank, 2, 29500, MASTER_ADDR="no host") for rank in range(2)]
    for code, text in Started(tmp_path, ranks, ["pretrain", "quickstart"]).end():
        assert (code, text.count("\n")) == (2, 1), text
        assert "the host of rank 0, no host, is not known" in text


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "ranks 1, 2 did not start in time"), (1, "rank 1: rank 0 does not answer at 127.0.0.1:")]
)
def test_ranks_that_do_not_start_are_named_after_the_limit(tmp_path, rank, said):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["pretrain", "quickstart", "data.batch_size=510", "runtime.start_timeout_s=0.2"]
    ((code, text),) = Started(tmp_path, [by_hand(rank, 3, port)], arguments).end()
    assert (code, text.count("\n")) == (2, 1), text
    assert said in text


def test_devices_that_differ_between_ranks_are_refused_on_every_rank(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = [["pretrain", "quickstart", f"runtime.device={name}"] for name in ("cpu", "auto")]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    pairs = zip(folders, settings, range(2), strict=True)
    started = [Started(folder, [by_hand(rank, 2, port)], arguments) for folder, arguments, rank in pairs]
    ended = [one.end()[0] for one in started]
    assert [code for code, _ in ended] == [2, 2]
    assert "rank 1 has runtime.device=auto, rank 0 has runtime.device=cpu" in ended[0][1]


def test_a_process_group_that_does_not_start_is_a_named_error_of_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nno device")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(RanksApart, match=r"rank 1 .*cannot communicate: NCCL error: unhandled") as caught:
        launch._start_group(launch.Launch(1, 2), dist.HashStore(), torch.device("cpu"), 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", ["0", "65536", "70000"])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(LaunchError, match=f"MASTER_PORT={port} is not a port"):
        launch.resolve({k: str(v) for k, v in by_hand(0, 2, port).items()})


def test_what_torchrun_started_meets_at_the_store_of_its_agent():
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = by_hand(0, 1, agent.port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="x y")
    found = launch.resolve({k: str(v) for k, v in environment.items()})
    assert (found.agent_store, found.run.split()) == (True, [found.run])
    _, device = launch.meet_ranks(found, "cpu", 5.0, {})
    assert device == torch.device("cpu")
