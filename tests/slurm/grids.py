"""Grids whose cells train for seconds, and functions that wait for them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import time
from pathlib import Path

from hpc_supcon.cli import main
from hpc_supcon.config import yaml12
from hpc_supcon.grid.folder import load
from hpc_supcon.grid.node_state import QUEUED, node_states

SETTINGS = {
    "data.source": "synthetic",
    "data.synthetic": {"images": 90, "classes": 3, "channels": 3, "image_size": 16},
    "data.batch_size": 16,
    "model.projection_hidden": 16,
    "model.projection_dim": 8,
    "train.epochs": 2,
    "checkpoint.every_epochs": None,
    "checkpoint.every_steps": 7,
    "log.tensorboard": False,
    "probe.linear.epochs": 2,
    "deterministic": True,
    "runtime.threads": 1,
    "runtime.timeout_s": 120.0,
}
LONG = {"train.epochs": 50}
"""So many epochs that there is time to interrupt a cell."""


def write_grid(folder: Path, name: str, **keys) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    settings = {**SETTINGS, **keys.pop("set", {})}
    path.write_text(yaml12.dumps({"name": name, "base": "quickstart", "set": settings, **keys}))
    return path


def write_profile(folder: Path, **keys) -> Path:
    path = folder / "profile.yaml"
    path.write_text(yaml12.dumps({"cluster": "slurm", **keys}))
    return path


def grid(*arguments: object) -> str:
    """Run `hpc-supcon grid ...` in this process; returns its stdout."""
    out, code = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            main(["grid", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
    assert not code, out.getvalue()
    return out.getvalue()


def states(folder: Path) -> dict[str, str]:
    return {name: state.state for name, state in node_states(load(folder)).items()}


def final_states(folder: Path, timeout_s: float = 240) -> dict[str, str]:
    """States of all nodes, once none is pending or running."""
    return wait_for(lambda: None if set(QUEUED) & set((found := states(folder)).values()) else found, timeout_s)


def wait_for(condition, timeout_s: float = 240, interval_s: float = 0.3):
    """Call `condition` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(interval_s)
    return result


def wait_for_checkpoint(run: Path) -> list[str]:
    """Wait for the first checkpoint; polls fast, so that the training is still in its middle."""
    return wait_for(lambda: steps_of(run), interval_s=0.01)


def steps_of(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-*")) if run.exists() else []


def weights(run: Path) -> str:
    """sha256 of the model in the last checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def processes_of(folder: Path) -> list[int]:
    """Pids of the processes with this folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def suspend_after_checkpoint(grid_folder: Path, cell: str) -> int:
    """SIGSTOP a cell's training once it has saved a checkpoint; returns its pid."""
    wait_for_checkpoint(grid_folder / "runs" / cell)
    config = str(grid_folder / "configs" / f"{cell}.yaml").encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"pretrain" in words and config in words:
                os.kill(int(path.name), signal.SIGSTOP)
                return int(path.name)
    raise AssertionError("ended before it could be suspended")
