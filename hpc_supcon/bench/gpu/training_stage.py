"""Stage training: whole commands. Are two deterministic runs, and one killed and resumed, equal to the bit? How long
does a step wait for a save? What accuracy do the seconds that are left give on real images?"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import checkpoint
from ...checkpoint.writer import CheckpointWriter, NamedTensors
from ...distributed.launch import start
from ...run_folder import CHECKPOINTS, RESULTS
from ..step_session import StepSession, step_config
from .work import Work

SAVES = 5
POLL_S = 0.005
SHORT = 50
"""Epochs; fewer want milder augmentation, as in the recipe cifar10-folder."""


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    short: tuple[str, ...]
    """Settings of the runs that are compared."""
    encoder: str
    image_size: int
    batch_size: int
    long: tuple[str, ...]
    """Settings of the run on real images."""
    reserve_s: float
    """For all of that run but its steps: start, decoding, the probes."""


ON_CUDA = Size(
    ("model.encoder=resnet18", "data.batch_size=256", "train.epochs=6", "checkpoint.every_steps=8"),
    "resnet18", 32, 512,
    ("model.encoder=resnet18", "data.batch_size=512", "probe.kind=[knn, linear]"), 30.0,
)  # fmt: skip
ON_CPU = Size(
    (
        "model.encoder=conv", "data.batch_size=16", "train.epochs=20", "checkpoint.every_steps=4",
        "data.synthetic={images: 64, image_size: 8, channels: 1}", "model.projection_hidden=8",
    ),
    "conv", 8, 8,
    ("model.encoder=conv", "data.batch_size=8", "probe.kind=knn", "probe.knn.k=1", "train.epochs=1"), 0.0,
)  # fmt: skip
QUIET = ("log.tensorboard=false", "log.progress=false")


def run(work: Work) -> None:
    size = ON_CPU if work.is_small else ON_CUDA
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with work.measuring("deterministic runs"):
            _compare_runs(work, size, folder)
        step_s = None
        with work.measuring("stall of a save"):
            step_s = _stall(work, size, folder)
        with work.measuring("training on real images"):
            _train(work, size, folder, step_s)


def _command(work: Work, what: str, folder: Path, settings: Sequence[str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpc_supcon", what, "default", *settings, *QUIET, f"run_dir={folder}"]
    command += [f"runtime.device={work.kind}", *(["runtime.threads=1"] if work.is_small else []), *more]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _end(work: Work, process: subprocess.Popen[str]) -> None:
    """Wait for its end. Raises RuntimeError with its last line where it fails, or does not end in the time left."""
    try:
        _, errors = process.communicate(timeout=max(1.0, work.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise RuntimeError("hpc-supcon did not end in the time that was left") from None
    if process.returncode:
        sys.stderr.write(errors)
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"hpc-supcon ended with exit code {process.returncode}: {last}")


def _compare_runs(work: Work, size: Size, folder: Path) -> None:
    """Two runs side by side, and a third that is killed after its first save and resumed."""
    settings = ["data.source=synthetic", "data.validation_fraction=0", "deterministic=true", *size.short]
    names = ("first", "second", "killed")
    began = time.monotonic()
    running = {name: _command(work, "pretrain", folder / name, settings) for name in names}
    saves = folder / "killed" / CHECKPOINTS
    while running["killed"].poll() is None and not checkpoint.list_steps(saves):
        time.sleep(POLL_S)
    running["killed"].kill()
    running["killed"].communicate()
    at = max(checkpoint.list_steps(saves), default=0)
    for name in names[:2]:
        _end(work, running[name])
    work.record.fact(start_s=time.monotonic() - began)
    digests = {name: _digest(folder / name) for name in names[:2]}
    _note(work, "two deterministic runs", digests["first"], digests["second"])
    if running["killed"].returncode == 0:
        work.skip("kill and resume", "the run ended before it could be killed")
        return
    _end(work, _command(work, "pretrain", folder / "killed", settings, "--resume"))
    _note(work, f"killed after the save of step {at}, and resumed", digests["first"], _digest(folder / "killed"))


def _note(work: Work, what: str, one: str, other: str) -> None:
    work.record.row("runs", what=what, sha256=one[:12], other=other[:12], equal=one == other)
    print(f"{what}: {'equal' if one == other else 'DIFFERENT'}", flush=True)
    if one != other:
        raise RuntimeError(f"{what}: model.safetensors has sha256 {one[:12]} and {other[:12]}")


def _digest(folder: Path) -> str:
    """sha256 of the weights of a run's last checkpoint."""
    saves = folder / CHECKPOINTS
    last = saves / f"step-{max(checkpoint.list_steps(saves))}"
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def _stall(work: Work, size: Size, folder: Path) -> float:
    """Note how much longer a step takes that saves; returns the seconds of one that does not."""
    overrides = [f"data.synthetic.image_size={size.image_size}", f"data.synthetic.images={max(64, size.batch_size)}"]
    config = step_config(size.encoder, "fp32" if work.is_small else "bf16", False, size.batch_size, overrides)

    def save(step: int, tensors: NamedTensors, state: Mapping[str, Any], *, protect: Collection[int] = ()) -> object:
        return checkpoint.save_checkpoint(folder / "saves", step, tensors, state, world_size=1, config_digest="d")

    with start(device=work.kind, threads=work.threads), closing(StepSession(config, work.device)) as session:
        session.run(3)
        state, plain, saving = session.training.state, [], []
        for _ in range(SAVES):
            plain.append(_seconds(work, lambda: session.run(1)))
            with CheckpointWriter(save, asynchronous=True) as writer:

                def both(writer: CheckpointWriter = writer) -> None:
                    session.run(1)
                    writer.save(state.step, state.tensors(), state.numbers())

                saving.append(_seconds(work, both))
    step, with_save = statistics.median(plain), statistics.median(saving)
    work.record.row("save", what=f"{size.encoder}, a step", ms=1e3 * step)
    work.record.row("save", what="a step that saves, written beside training", ms=1e3 * with_save)
    work.record.row("save", what="stall", ms=1e3 * (with_save - step))
    return step


def _seconds(work: Work, call: Callable[[], object]) -> float:
    if work.kind == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if work.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _train(work: Work, size: Size, folder: Path, step_s: float | None) -> None:
    """SupCon and its probes for as many epochs as there is time for."""
    if work.data is None:
        work.skip("training on real images", "no --data: give CIFAR-10 as an image folder of JPEGs")
        return
    if step_s is None:
        work.skip("training on real images", "the time of a step is not known")
        return
    settings = ["data.source=image_folder", f"data.root={work.data}", *size.long]
    epochs = 1
    settings += ["report.embeddings=false", "report.html=false", "probe.embedding=false"]
    if not work.is_small:
        images = sum(1 for _ in (work.data / "train").rglob("*.*"))
        epoch_s = images / size.batch_size * step_s
        epochs = int((work.left() - size.reserve_s) / epoch_s)
        if epochs < 1:
            work.has_time(f"training on real images: an epoch of {epoch_s:.1f} s", size.reserve_s + epoch_s)
            return
        settings += [f"train.epochs={epochs}", f"optim.warmup_epochs={epochs / 20:g}"]
        if epochs < SHORT:
            settings += ["augment.crop_scale=[0.4, 1.0]", "augment.hue=0.05", "augment.grayscale=0.1"]
    began = time.monotonic()
    _end(work, _command(work, "run", folder / "real", settings))
    seconds = time.monotonic() - began
    for result in json.loads((folder / "real" / RESULTS).read_text(encoding="utf-8"))["results"]:
        accuracy = result["test"]["accuracy"]
        print(f"{size.encoder}, {epochs} epochs, {result.get('probe')}: test accuracy {accuracy:.4f}", flush=True)
        work.record.row(
            "accuracy", data=work.data.name, encoder=size.encoder, epochs=epochs, seconds=seconds,
            probe=str(result.get("probe", "")), accuracy=accuracy,
        )  # fmt: skip
