"""Runs that are killed at random moments and resumed: a few times by the tests, many times by the benchmarks."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

from hpc_supcon import checkpoint
from hpc_supcon.training import fit

from . import injector
from .runs import STEPS_PER_EPOCH, Run

SAVE_EVERY = 3


def settings(epochs):
    return [f"train.epochs={epochs}", f"checkpoint.every_steps={SAVE_EVERY}", "runtime.timeout_s=60"]


def random_kills(folder, ranks, kills, *, epochs, seed=0, main=None, environment=None, more=()):
    """Start a run, SIGKILL a random rank at a random moment, resume, ... and let it complete; returns the faults.

    A moment is a step, or a random system call of a save. The other ranks must end by themselves.
    """
    rng, last, faults = random.Random(seed), epochs * STEPS_PER_EPOCH, []
    arguments = {"main": main, "environment": environment}
    for kill in range(kills + 1):
        steps = checkpoint.list_steps(folder / "checkpoints")
        again = ["--resume"] if folder.exists() else []
        fault = _moment(rng, steps[-1] if steps else 0, last, ranks) if kill < kills else ""
        it = Run(ranks, folder, *settings(epochs), *more, *again, fault=fault, **arguments)
        codes = it.end()
        if not fault:
            assert codes == [0] * ranks, it.stderr
            return faults
        assert -9 in codes, f"{fault} killed nobody: {codes}\n{it.stderr}"
        faults.append(fault)
    raise AssertionError


def _moment(rng, done, last, ranks):
    """A fault within the next few steps, so that all kills happen before the run ends."""
    step = min(done + rng.randint(1, 2 * SAVE_EVERY), last - 1)
    if rng.random() < 0.5:
        return f"kill@rank={rng.randrange(ranks)},step={step}"
    # only rank 0 saves; every save makes at least 25 system calls
    step = min(-(-(done + 1) // SAVE_EVERY) * SAVE_EVERY, last // SAVE_EVERY * SAVE_EVERY)
    return f"kill@rank=0,step={step},phase=save,call={rng.randint(1, 25)}"


def log_resources():
    """The run, which every few steps writes a line: memory, file descriptors, threads, entries of /dev/shm."""
    step = fit.train_step

    def logged_step(state, *args, **kwargs):
        result = step(state, *args, **kwargs)
        if state.step % 5 == 0 and os.environ.get("RANK", "0") == "0":
            with Path(os.environ["RESOURCES"]).open("a") as file:
                file.write(json.dumps(resources(state.step)) + "\n")
        return result

    fit.train_step = logged_step
    injector.main()


def resources(step):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "process": os.getpid(),
        "step": step,
        "memory_kib": int(status["VmRSS"].split()[0]),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
        "python_threads": threading.active_count(),
        "shm": len(list(Path("/dev/shm").iterdir())),
    }


def soak(folder, ranks, kills, *, epochs, seed=1):
    """Samples of `resources` from all processes of a run that was killed and resumed several times."""
    log = folder.with_suffix(".resources")
    random_kills(
        folder, ranks, kills, epochs=epochs, seed=seed, main=log_resources,
        environment={"RESOURCES": str(log)}, more=("data.loader=torch", "data.workers=1"),
    )  # fmt: skip
    return [json.loads(line) for line in log.read_text().splitlines()]
