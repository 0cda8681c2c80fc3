"""Grids on a real Slurm: they run to the report, resume when interrupted, and a cell that fails stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from hpc_supcon.grid.folder import load, read_record

from .grids import (
    LONG,
    final_states,
    grid,
    states,
    steps_of,
    suspend_after_checkpoint,
    wait_for,
    weights,
    write_grid,
    write_profile,
)

pytestmark = pytest.mark.timeout(1200)  # a dozen processes at a time, also on few cores
ROOT_AXES = {
    "model.encoder": ["conv", "resnet9_small"],
    "loss.name": ["supcon_in", "supcon_out"],
    "prune.rate": [None, 0.5],
}
LEFT_OUT = [("supcon_in", "resnet9_small"), ("supcon_out", "conv")]  # one loss for each encoder shows as much


@pytest.fixture(scope="module")
def interrupted(cluster, tmp_path_factory):
    """Two long cells, each on a node of its own: one reaches its time limit, the other is preempted."""
    made = {}
    for name, node, minutes in (("limited", "n1", 1), ("preempted", "n2", 60)):
        folder = tmp_path_factory.mktemp(name)
        path = write_grid(folder, name, set=LONG, resources={"pretrain": {"minutes": minutes}})
        profile = write_profile(folder, signal_s=10, sbatch={"nodelist": node})
        grid("submit", path, "--profile", profile, "--dir", folder / "g")
        made[name] = folder / "g"
    for name, folder in made.items():
        suspend_after_checkpoint(folder, "cell")
        assert states(folder)["cell.pretrain"] == "running", name
    # a job of higher priority that needs all four cores of the node
    options = ["--partition=high", "--nodelist=n2", "--nodes=1", "--ntasks=4", "--output=/dev/null", "--wrap=true"]
    subprocess.run(["sbatch", "--wait", *options], check=True, capture_output=True)
    return made


def test_a_grid_of_real_trainings_runs_to_the_report(interrupted, tmp_path):
    """Submitted while the interrupted cells are in the queue; one cell trains on two nodes with two ranks each."""
    two_nodes = {"cells": {"loss.name": "supcon_in", "model.encoder": "conv"}, "pretrain": {"nodes": 2, "tasks": 2}}
    others = [{"loss.name": loss, "model.encoder": encoder} for loss, encoder in LEFT_OUT]
    path = write_grid(tmp_path, "cube", axes=ROOT_AXES, exclude=others, resources={"where": [two_nodes]})
    folder = tmp_path / "a b" / "g"
    grid("submit", path, "--cluster", "slurm", "--dir", folder)
    assert set(final_states(folder).values()) == {"done"}
    frozen = load(folder)
    # one pre-training for each encoder and loss, shared by the cell that probes it and the one that prunes it
    assert (len(frozen.cells), len(frozen.nodes)) == (4, 6)
    for cell in frozen.cells:
        wide = cell.labels["loss.name"] == "supcon_in" and cell.labels["model.encoder"] == "conv"
        trained = frozen.run_folder(frozen.nodes[cell.nodes[0]])
        first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
        assert first["world_size"] == (4 if wide else 1)
    assert "0 of 6 nodes submitted" in grid("submit", path, "--cluster", "slurm", "--dir", folder)
    grid("report", folder)
    table = (folder / "report" / "report.md").read_text()
    for cell in frozen.cells:
        result = json.loads((folder / "runs" / cell.name / "results.json").read_text())["results"][0]
        assert f"{result['test']['accuracy']:.4f}" in table
        if cell.labels["prune.rate"] == "0.5":
            assert (result["stage"], result["prune"]["zeros"]) == ("prune", round(result["prune"]["weights"] / 2))
            assert f"{result['size']['dense_bytes'] / result['size']['sparse_bytes']:.2f}" in table
    assert "missing" not in table


@pytest.mark.parametrize(("name", "reason"), [("preempted", "preempted"), ("limited", "time limit")])
def test_an_interrupted_cell_is_requeued_and_ends_with_the_weights_of_an_uninterrupted_one(
    interrupted, uninterrupted, name, reason
):
    folder = interrupted[name]
    assert set(final_states(folder).values()) == {"done"}
    record = read_record(folder, "cell.pretrain")
    assert {entry["reason"] for entry in record.requeues} == {reason}
    assert "going on from step" in grid("logs", folder, "cell.pretrain")
    assert weights(folder / "runs" / "cell") == uninterrupted


def test_a_failed_cell_does_not_stop_the_others_and_only_it_is_submitted_again(cluster, tmp_path):
    images = {"data.source": "image_folder", "data.root": str(tmp_path / "images"), "data.image_size": 16}
    path = write_grid(tmp_path, "g", axes={"data": {"good": {"seed": 1}, "bad": {**images, "seed": 2}}})
    folder = tmp_path / "g"
    grid("submit", path, "--cluster", "slurm", "--dir", folder)
    assert final_states(folder) == {
        "good.pretrain": "done", "good.probe": "done", "bad.pretrain": "failed", "bad.probe": "blocked",
    }  # fmt: skip
    shown = grid("status", folder)
    assert str(tmp_path / "images") in shown, "the last line of the error"
    assert str(folder / "logs" / "bad.pretrain.log") in shown
    done = read_record(folder, "good.pretrain")
    write_images(tmp_path / "images")
    assert "2 nodes submitted again" in grid("retry", folder, "--failed")
    assert set(final_states(folder).values()) == {"done"}
    assert read_record(folder, "good.pretrain") == done


def write_images(root):
    code = (
        "import sys; from pathlib import Path; from PIL import Image; import random\n"
        "for split in ('train', 'test'):\n"
        "    for label in 'abc':\n"
        f"        folder = Path({str(root)!r}) / split / label; folder.mkdir(parents=True)\n"
        "        for i in range(16):\n"
        "            Image.frombytes('RGB', (8, 8), random.Random(i).randbytes(192)).save(folder / f'{i}.png')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_running_and_pending_cells_stay_cancelled(cluster, tmp_path):
    path = write_grid(tmp_path, "g", set=LONG, axes={"loss.name": ["supcon_in", "supcon_out"]})
    folder = tmp_path / "g"
    grid("submit", path, "--profile", write_profile(tmp_path, parallel=1), "--dir", folder)
    suspend_after_checkpoint(folder, "supcon-in")
    assert states(folder) == {
        "supcon-in.pretrain": "running", "supcon-in.probe": "pending",
        "supcon-out.pretrain": "pending", "supcon-out.probe": "pending",
    }  # fmt: skip
    assert "4 nodes cancelled" in grid("cancel", folder)
    wait_for(lambda: set(states(folder).values()) <= {"cancelled", "blocked"})
    found = states(folder)
    assert found["supcon-in.pretrain"] == found["supcon-out.pretrain"] == "cancelled"
    assert "0 nodes cancelled" in grid("cancel", folder)
    assert not steps_of(folder / "runs" / "supcon-out")


def test_batch_scripts_run_as_shipped(cluster, tmp_path, request):
    scripts = request.config.rootpath / "slurm"
    small = [f"{k}={json.dumps(v)}" for k, v in {**SMALL, "data.batch_size": 16}.items()]
    (tmp_path / "runs.txt").write_text(
        "".join(f"pretrain quickstart {' '.join(map(quoted, small))} seed={i} run_dir=array-{i}\n" for i in range(2))
    )
    jobs = [
        ["--nodes=2", "--ntasks-per-node=2", scripts / "train.sbatch", "pretrain", "quickstart", *small, "run_dir=a"],
        ["--nodes=2", scripts / "train-torchrun.sbatch", "pretrain", "quickstart", *small, "run_dir=b"],
        ["--array=1-2", scripts / "array.sbatch", "runs.txt"],
    ]
    runs = ["a", "b", "array-0", "array-1"]
    if find_spec("deepspeed") is not None:
        deepspeed = ["train.engine=deepspeed", "train.deepspeed.zero=1", "run_dir=c"]
        jobs.append(["--nodes=2", scripts / "train.sbatch", "pretrain", "quickstart", *small, *deepspeed])
        runs.append("c")
    environment = f"ALL,PYTHON={sys.executable},RANKS=2"
    started = [
        subprocess.Popen(["sbatch", "--wait", f"--export={environment}", *map(str, job)], cwd=tmp_path)
        for job in jobs
    ]
    logs = lambda: "\n".join(p.read_text() for p in tmp_path.glob("*.log"))  # noqa: E731
    assert {process.wait() for process in started} == {0}, logs()
    worlds = {}
    for run in runs:
        events = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        worlds[run] = events[0]["world_size"]
        assert events[-1]["event"] == "end"
    assert worlds == {run: {"a": 4, "b": 4, "c": 2}.get(run, 1) for run in runs}
    assert "FutureWarning" not in logs(), logs()
    assert weights(tmp_path / "a") == weights(tmp_path / "b"), "srun's ranks and torchrun's compute the same"


SMALL = {
    "data.source": "synthetic",
    "data.synthetic": {"images": 90, "classes": 3, "channels": 3, "image_size": 16},
    "train.epochs": 2,
    "deterministic": True,
    "log.tensorboard": False,
    "runtime.threads": 1,
}


def quoted(word: str) -> str:
    return f"'{word}'"


def test_held_jobs_are_pending_and_one_cell_can_be_cancelled_alone(cluster, tmp_path):
    path = write_grid(tmp_path, "g", axes={"loss.name": ["supcon_in", "supcon_out"]})
    folder = tmp_path / "g"
    grid("submit", path, "--profile", write_profile(tmp_path, sbatch={"hold": True}), "--dir", folder)
    shown = grid("status", folder)
    assert "JobHeldUser" in shown
    assert states(folder)["supcon-in.pretrain"] == "pending"
    grid("cancel", folder, "supcon-in")
    assert states(folder)["supcon-out.pretrain"] == "pending"
    grid("cancel", folder)
    wait_for(lambda: set(states(folder).values()) <= {"cancelled", "blocked"})
