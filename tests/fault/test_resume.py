"""A run that is killed after a checkpoint and resumed ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_supcon import checkpoint

from .runs import RUN_TIMEOUT_S

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.epochs=12", "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "log.every_steps=1",
    "log.tensorboard=false", "deterministic=true", "optim.warmup_epochs=1", "runtime.threads=1",
    "optim.clip_norm=1", "train.ema=0.9",
]  # fmt: skip
STEPS = 12 * (81 // 16)


def command(ranks, folder, *more):
    if ranks == 1:
        start = [sys.executable, "-m", "hpc_supcon"]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "-m", "hpc_supcon"]
    return [*start, "pretrain", "default", *SETTINGS, f"run_dir={folder}", *more]


def hashes(folder):
    path = folder / "checkpoints" / f"step-{STEPS}"
    checkpoint.load_checkpoint(path)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("*.safetensors")}


def kill_after_a_checkpoint(ranks, folder, *more):
    """Start, wait for a new checkpoint, then SIGKILL the launcher and every rank."""
    seen = checkpoint.list_steps(folder / "checkpoints")
    process = subprocess.Popen(
        command(ranks, folder, *more), start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while checkpoint.list_steps(folder / "checkpoints") == seen:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    kill_everything(process, str(folder))
    return checkpoint.list_steps(folder / "checkpoints")[-1]


def kill_everything(process, folder):
    """SIGKILL the launcher and, since torchrun puts each rank into a session of its own, every rank."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and folder in read(p / "cmdline")]
    assert process.pid in pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() and folder in read(Path(f"/proc/{pid}/cmdline")) for pid in pids):
        time.sleep(0.01)


def read(path):
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, ranks):
    subprocess.run(command(ranks, tmp_path / "whole"), check=True, capture_output=True)
    killed_at = [kill_after_a_checkpoint(ranks, tmp_path / "killed")]
    killed_at.append(kill_after_a_checkpoint(ranks, tmp_path / "killed", "--resume"))
    assert killed_at[0] < killed_at[1] < STEPS, "a kill came too late for this test"
    assert any(step % (81 // 16) for step in killed_at), "some kill is in the middle of an epoch"
    done = subprocess.run(command(ranks, tmp_path / "killed", "--resume"), check=True, capture_output=True, text=True)
    assert f"going on from step {killed_at[1]}" in done.stderr
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")

    def losses(folder):
        lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        return {e["step"]: e["loss"] for e in lines if e["event"] == "train"}

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_another_number_of_ranks_is_a_named_error_on_resume(tmp_path):
    kill_after_a_checkpoint(1, tmp_path / "r")
    done = subprocess.run(command(2, tmp_path / "r", "--resume"), capture_output=True, text=True, check=False)
    assert "saved by 1 ranks, resumed on 2" in done.stderr
    assert "exitcode  : 2" in done.stderr
