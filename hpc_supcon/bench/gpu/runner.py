"""Runs the stages one after another, each in a process of its own that cannot outlive its limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import DataError, OutputError
from .device_check import check_device
from .plan import MARGIN_S, STAGES, Stage, check_budget, chosen_stages, limit
from .record import DONE, FAILED, NO_TIME, TOO_SLOW, Record, read
from .report import write_report

LINES = 30
"""Of stderr, kept from a stage that failed."""
PACKAGE = Path(__file__).parents[3]


def bench_gpu(budget: float, out: Path, device: str, only: Sequence[str], data: Path | None) -> bool:
    """Run the stages and write out/report.md; whether all of them ran without an error.

    Stages that are done are not repeated unless `only` names them. budget: seconds. device: auto, cpu or cuda. data:
    CIFAR-10 as an image folder of JPEGs. Raises ConfigError, DataError and OutputError before anything is measured.
    """
    began = time.monotonic()
    stages = chosen_stages(only)
    pending = [stage for stage in stages if only or not _is_done(out / stage.file)]
    check_budget(budget, pending)
    if data is not None and not all((data / split).is_dir() for split in ("train", "test")):
        raise DataError(
            f"--data {data}: has no folders train and test; give an image folder such as CIFAR-10 as JPEGs"
        )
    kind = check_device(device)
    _prepare(out, kind)
    with _ended_by_sigterm():
        for i, stage in enumerate(pending):
            left = budget - (time.monotonic() - began)
            try:
                run_stage(stage, out, kind, data, limit(left, pending[i:]))
            finally:
                write_report(out)
    write_report(out)
    print(f"written: {out / 'report.md'}")
    return all(_is_done(out / stage.file) for stage in stages)


def run_stage(stage: Stage, out: Path, kind: str, data: Path | None, seconds: float) -> None:
    """Run one stage for at most `seconds`, and note in its file how it ended. 0 seconds: it is not started."""
    record = Record.start(out / stage.file, stage.name, kind, seconds)
    if not seconds:
        print(f"{stage.name}: not started: fewer than the {stage.least:g} s that it needs were left", flush=True)
        record.end(NO_TIME, 0.0)
        return
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    command = stage_command(stage, out, kind, data, began + seconds - MARGIN_S)
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        code = _run(command, seconds, stderr.fileno(), {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {})
        stderr.seek(0)
        last = stderr.read().splitlines()[-LINES:]
    record = Record.load(out / stage.file)  # as the stage has left it
    taken = time.monotonic() - began
    if code is None:
        record.end(TOO_SLOW, taken, stderr=last)
        print(f"{stage.name}: killed at its limit of {seconds:.0f} s", flush=True)
    elif code:
        record.end(FAILED, taken, exit_code=code, stderr=last)
        print(f"{stage.name}: failed with exit code {code}: {last[-1] if last else 'no message'}", flush=True)
    else:
        record.end(DONE, taken)
    for partial in out.glob(f".{stage.file}.partial-*"):  # of a process that was killed while it wrote
        partial.unlink(missing_ok=True)


def stage_command(stage: Stage, out: Path, kind: str, data: Path | None, deadline: float) -> list[str]:
    """The process of a stage; `deadline`: see Work."""
    command = [sys.executable, "-m", "hpc_supcon.bench.gpu", stage.name, "--out", str(out), "--device", kind]
    return [*command, "--deadline", str(deadline), *(["--data", str(data)] if data else [])]


def _run(command: Sequence[str], seconds: float, stderr: int, variables: Mapping[str, str]) -> int | None:
    """The exit code; None after `seconds`. Nothing that the command started is left."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True, env=environment
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit inside, so that the running stage does not outlive this process."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(out: Path, kind: str) -> None:
    """Make the folder. Raises OutputError where it cannot be made, or holds numbers of another device."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be made: {error.strerror}") from None
    for stage in STAGES:
        path = out / stage.file
        if path.exists() and (found := read(path)["device"]) != kind:
            raise OutputError(f"--out {out}: holds numbers measured on {found}, not {kind}; choose another folder")


def _is_done(path: Path) -> bool:
    return path.exists() and read(path)["status"] == DONE
