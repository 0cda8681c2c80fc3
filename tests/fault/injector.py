"""Runs a command with faults injected at a chosen rank, step and moment. The package has no code for this.

By hand, in place of `hpc-supcon`:

    HPC_SUPCON_FAULT="kill@step=7,phase=rename" python -m tests.fault.injector pretrain default ...
    HPC_SUPCON_FAULT="enospc@rank=0,step=14,phase=write,call=3" torchrun ... -m tests.fault.injector ...

A fault is ACTION@key=value,...; several are separated by `;`. Keys: `rank` (default 0), `step` (default: any),
`call` (default 1: the first time that the rest fits; 0: every time), `file` (truncate, flip: default
model.safetensors) and `phase`:

    step                                          before that optimizer step
    open write fsync rename mkdir unlink rmdir    before the `call`-th such system call of that step's save
    save                                          before the `call`-th system call of any of these kinds
    saved                                         after that step's save
    validation                                    before the validation after that step
    probe                                         before the probes (step 0)

Actions: kill stop abort usr2 term (signals to itself), hang (for ever), raise (an exception with no name), corrupt
(the error of an image that does not decode), enospc edquot erofs eacces eio (OSError from the system call), half
(half of a write, then SIGKILL), truncate flip (damage the file of the checkpoint just published), timeout (from now
on a training step may take TIMEOUT_S: faster to wait for than runtime.timeout_s, which also limits the start of a
run, however busy the machine is).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "usr2": signal.SIGUSR2,
    "term": signal.SIGTERM,
}
ERRORS = ("enospc", "edquot", "erofs", "eacces", "eio")
ACTIONS = (*SIGNALS, "hang", "abort", "raise", "corrupt", *ERRORS, "half", "truncate", "flip", "timeout")
TIMEOUT_S = 6
PHASES = ("step", *CALLS, "save", "saved", "validation", "probe")


class InjectedError(Exception):
    """An exception that the package does not handle."""


@dataclass(frozen=True)
class Fault:
    action: str
    rank: int = 0
    step: int | None = None
    phase: str = "step"
    call: int = 1
    file: str = "model.safetensors"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS or self.phase not in PHASES:
            raise ValueError(f"unknown action or phase: {self.action}@phase={self.phase}")


def parse(text: str) -> list[Fault]:
    faults = []
    for part in filter(None, text.split(";")):
        action, _, rest = part.strip().partition("@")
        pairs = dict(pair.split("=") for pair in rest.split(",") if pair)
        numbers = {key: int(pairs.pop(key)) for key in ("rank", "step", "call") if key in pairs}
        faults.append(Fault(action, **numbers, **pairs))
    return faults


@contextmanager
def system_calls(before: Callable[[str, tuple[Any, ...]], None]):
    """Call `before(name, arguments)` before every system call of CALLS, in any thread."""
    originals = {name: getattr(os, name) for name in CALLS}

    def hooked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, hooked(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class Injector:
    """Counts how often the moment of each fault was reached, and injects it the `call`-th time."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._seen = dict.fromkeys(self._faults, 0)
        self._saving = threading.local()

    def at(self, phase: str, step: int, *, write: tuple[Any, ...] = (), published: Path | None = None) -> None:
        for fault in self._faults:
            if fault.phase == phase and fault.step in (None, step):
                self._seen[fault] += 1
                if fault.call in (0, self._seen[fault]):
                    inject(fault, write, published)

    def before_call(self, name: str, args: tuple[Any, ...]) -> None:
        step = getattr(self._saving, "step", None)
        if step is not None:
            self.at(name, step, write=args)
            self.at("save", step, write=args)

    def around_save(self, save: Callable[..., Path]) -> Callable[..., Path]:
        def wrapped(folder: Path, step: int, *args: Any, **kwargs: Any) -> Path:
            self._saving.step = step
            try:
                path = save(folder, step, *args, **kwargs)
            finally:
                self._saving.step = None
            self.at("saved", step, published=path)
            return path

        return wrapped

    def around_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(state: Any, *args: Any, **kwargs: Any) -> Any:
            self.at("step", state.step + 1)
            return train_step(state, *args, **kwargs)

        return wrapped

    def around_validation(self, run_validation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(loop: Any) -> Any:
            self.at("validation", loop.training.state.step)
            return run_validation(loop)

        return wrapped

    def around_probe(self, probe: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.at("probe", 0)
            return probe(*args, **kwargs)

        return wrapped


def inject(fault: Fault, write: tuple[Any, ...], published: Path | None) -> None:
    if fault.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.action])
    elif fault.action == "hang":
        threading.Event().wait()
    elif fault.action == "abort":
        os.abort()
    elif fault.action == "timeout":
        shorten_timeout()
    elif fault.action == "raise":
        raise InjectedError(f"{fault.phase} of step {fault.step}")
    elif fault.action == "corrupt":
        from hpc_supcon.errors import CorruptSample

        raise CorruptSample("image train/[cat]/7.png does not decode")
    elif fault.action in ERRORS:
        number = getattr(errno, fault.action.upper())
        raise OSError(number, os.strerror(number))
    elif fault.action == "half":
        handle, part = write
        os.truncate(handle, os.lseek(handle, 0, os.SEEK_CUR))
        os.pwrite(handle, part[: len(part) // 2], os.lseek(handle, 0, os.SEEK_CUR))
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        assert published is not None, f"{fault.action} needs phase=saved"
        damage(published / fault.file, fault.action)


def shorten_timeout() -> None:
    from hpc_supcon.distributed.watchdog import current_watchdog

    watchdog = current_watchdog()
    watchdog.step_timeout_s = TIMEOUT_S
    watchdog.current_phase = replace(watchdog.current_phase, timeout_s=TIMEOUT_S)


def damage(path: Path, how: str) -> None:
    """Truncate a file to half its size, or flip the lowest bit of the byte in the middle."""
    payload = bytearray(path.read_bytes())
    middle = len(payload) // 2
    if how == "truncate":
        del payload[middle:]
    else:
        payload[middle] ^= 1
    path.write_bytes(payload)


def main() -> None:
    from hpc_supcon import checkpoint, cli
    from hpc_supcon.distributed import abort
    from hpc_supcon.stages import probe
    from hpc_supcon.training import fit

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    injector = Injector(parse(os.environ.get("HPC_SUPCON_FAULT", "")), rank)
    checkpoint.save_checkpoint = injector.around_save(checkpoint.save_checkpoint)  # type: ignore[assignment]
    fit.train_step = injector.around_step(fit.train_step)
    fit._Loop.run_validation = injector.around_validation(fit._Loop.run_validation)
    probe.probe = injector.around_probe(probe.probe)
    abort.RANKS_TIMEOUT_S = 100.0  # on a busy machine a rank may need long to write its stacks
    with system_calls(injector.before_call):
        cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
