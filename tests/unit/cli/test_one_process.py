"""A command that is the work of one process is refused where a launcher started several, before it does anything."""

from __future__ import annotations

import pytest
import typer

from hpc_supcon import cli
from hpc_supcon.cli.app import OF_ALL_RANKS, app
from hpc_supcon.distributed.resolve import check_one_process

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ARGUMENTS = {
    "config": ["config", "quickstart"],
    "convert": ["convert", "images", "out.beton"],
    "verify": ["verify", "images"],
    "checkpoints": ["checkpoints", "run"],
    "export": ["export", "run", "--format", "onnx"],
    "embed": ["embed", "run", "images", "-o", "out.npz"],
    "predict": ["predict", "run", "images"],
    "push": ["push", "run", "--to", "model"],
    "bench": ["bench", "loss", "--size", "8"],
    "grid": ["grid", "expand", "grid.yaml"],
    "report": ["report", "run"],
    "track": ["track", "run"],
    "doctor": ["doctor"],
    "init": ["init", "images"],
    "compare": ["compare", "a", "b"],
}


def test_every_command_is_either_that_of_all_ranks_or_of_one_process():
    assert {*ARGUMENTS, *OF_ALL_RANKS} == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", ARGUMENTS)
@pytest.mark.parametrize(
    ("launch", "advice"),
    [
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4"}, "write `srun --ntasks=1 hpc-supcon {} ...`"),
        (TORCHRUN, "start it without torchrun"),
    ],
    ids=["srun", "torchrun"],
)
def test_several_processes_of_it_are_refused_with_what_to_write(
    capsys, monkeypatch, tmp_path, command, launch, advice
):
    monkeypatch.chdir(tmp_path)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        cli.main(ARGUMENTS[command])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    assert f"`hpc-supcon {command}` is the work of one process, but 4 were started" in err
    assert advice.format(command) in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "launch",
    [
        {},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # srun --ntasks=1 in a job of four tasks
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # in the batch script, without srun
        {**TORCHRUN, "WORLD_SIZE": "1"},
    ],
    ids=["alone", "srun --ntasks=1", "a batch script", "torchrun of one"],
)
def test_one_process_is_not_refused(launch):
    check_one_process("verify", launch)
