"""What this machine has and lacks for each feature, one finding a line. Changes nothing; stays on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .. import __version__
from ..environment import known_commit
from .common import is_installed, memory_available

Status = Literal["ok", "absent", "problem"]
MIB, GIB = 2**20, 2**30
SHARED_MEMORY = 1 * GIB
"""Free bytes of /dev/shm below which loaders with workers and NCCL may fail."""
TESTED_BYTES, TESTED_FILES = 64 * MIB, 200

EXTRAS = {
    "ffcv": ("ffcv", "data.loader=ffcv"),
    "dali": ("nvidia.dali", "data.loader=dali"),
    "deepspeed": ("deepspeed", "train.engine=deepspeed"),
    "export": ("onnxscript", "export --format onnx"),
    "umap": ("umap", "report.methods=[umap]"),
    "bench": ("pytorch_metric_learning", "bench loss: pml"),
    "wandb": ("wandb", "log.to=wandb"),
    "mlflow": ("mlflow", "log.to=mlflow"),
    "huggingface": ("datasets", "data.source=huggingface"),
    "webdataset": ("webdataset", "data.source=webdataset"),
    "tiff": ("tifffile", "TIFFs of many bands"),
    "lora": ("peft", "model.lora"),
    "hub": ("huggingface_hub", "push --to hf:NAME"),
}
"""Extra -> (module that shows that it is installed, what needs it)."""


@dataclass(frozen=True)
class Finding:
    """status: absent means that a feature is not there, problem that something will fail or be slow."""

    topic: str
    status: Status
    text: str
    remedy: str = ""


def findings(folder: Path) -> Iterator[Finding]:
    """Everything, in the order in which it is shown. folder: whose storage is measured; must be writable."""
    yield from _software()
    yield from _devices()
    yield from _host()
    yield _storage(folder)
    yield from _launchers()
    for extra, (module, what) in EXTRAS.items():
        yield _extra(extra, module, what)


def _software() -> Iterator[Finding]:
    commit = known_commit()
    yield Finding("hpc_supcon", "ok", f"{__version__} {commit}" if commit else __version__)
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("PyTorch", "ok", f"{torch.__version__}, {cuda}, Python {platform.python_version()}")


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if about.major >= 8 else "no bf16: train.precision=fp16"
            text = f"{about.name}, {about.total_memory / GIB:.0f} GiB, sm_{about.major}{about.minor}, {bf16}"
            yield Finding(f"GPU {i}", "ok", text)
        yield _nccl()
        return
    if not torch.version.cuda:
        yield Finding("GPU", "absent", "this PyTorch cannot use one", "install PyTorch's build for CUDA")
    elif not Path("/dev/nvidiactl").exists():
        yield Finding("GPU", "absent", "no NVIDIA driver (/dev/nvidiactl): everything runs on the CPU")
    else:
        yield Finding(
            "GPU", "problem", "there is a driver, but PyTorch finds no GPU",
            "nvidia-smi says why; CUDA_VISIBLE_DEVICES may hide it, or the driver may be too old",
        )  # fmt: skip


def _nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "problem", "not in this PyTorch", "install PyTorch's build for CUDA")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _host() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if os.name == "posix" else ""
    bf16 = ", computes in bf16: train.precision=bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else ""
    yield Finding("CPU", "ok", f"{cores} cores for this process{bf16}")
    yield Finding("memory", "ok", f"{memory_available() / GIB:.1f} GiB available")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    small = shared < SHARED_MEMORY
    yield Finding(
        "shared memory", "problem" if small else "ok", f"{shared / GIB:.1f} GiB free in /dev/shm",
        "in a container: docker run --shm-size=8g" if small else "",
    )  # fmt: skip
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang"))), None)
    if compiler is None:
        yield Finding("compiler", "absent", "train.compile and Triton's kernels need one", "apt-get install gcc")
    else:
        yield Finding("compiler", "ok", compiler)


def _storage(folder: Path) -> Finding:
    """Of one large file, and of many small ones, each written to the disk before it counts."""
    topic = f"storage of {folder}"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as found:
            large = _write_rate([Path(found) / "large"], TESTED_BYTES)
            small = _write_rate([Path(found) / str(i) for i in range(TESTED_FILES)], 4096)
    except OSError as error:
        return Finding(topic, "problem", f"cannot be written: {error.strerror}", "choose another folder: --folder")
    text = f"writes {large * TESTED_BYTES / MIB:,.0f} MiB/s, {small:,.0f} small files/s"
    slow = small < 20
    return Finding(
        topic, "problem" if slow else "ok", text,
        "keep run folders elsewhere, or save less often: checkpoint.every_epochs" if slow else "",
    )  # fmt: skip


def _write_rate(paths: list[Path], size: int) -> float:
    """Files a second."""
    content = os.urandom(size)
    start = time.monotonic()
    for path in paths:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return len(paths) / max(1e-9, time.monotonic() - start)


def _launchers() -> Iterator[Finding]:
    if shutil.which("sinfo") is None:
        yield Finding("Slurm", "absent", "no sinfo on PATH", "grids run here: --cluster local")
        return
    try:
        line = ["sinfo", "--noheader", "--format=%R %a %D"]
        done = subprocess.run(line, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        yield Finding(
            "Slurm", "problem", reason[0] if reason else "sinfo failed",
            "no controller answers: log in where the cluster is, or slurm/local-cluster.sh start",
        )  # fmt: skip
        return
    partitions = ", ".join(sorted({text.split()[0] for text in done.stdout.splitlines() if text.split()}))
    yield Finding("Slurm", "ok", f"partitions: {partitions or 'none'}")


def _extra(extra: str, module: str, what: str) -> Finding:
    if is_installed(module):
        return Finding(what, "ok", f"{module} is installed")
    return Finding(what, "absent", f"{module} is not installed", f"pip install 'hpc-supcon[{extra}]'")
