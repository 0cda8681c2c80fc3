"""Runs that are killed at random and only started again: used by the tests (a few kills) and benchmarks (many)."""

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
    """Start a run, SIGKILL a random rank at a random moment, start again, ...; the moments, or an assertion.

    A moment is a step, or a random system call of a save. Survivors must end by themselves.
    """
    chance, last, faults = random.Random(seed), epochs * STEPS_PER_EPOCH, []
    arguments = {"main": main, "environment": environment}
    for kill in range(kills + 1):
        steps = checkpoint.list_steps(folder / "checkpoints")
        again = ["--resume"] if folder.exists() else []
        fault = _moment(chance, steps[-1] if steps else 0, last, ranks) if kill < kills else ""
        it = Run(ranks, folder, *settings(epochs), *more, *again, fault=fault, **arguments)
        codes = it.end()
        if not fault:
            assert codes == [0] * ranks, it.said
            return faults
        assert -9 in codes, f"{fault} killed nobody: {codes}\n{it.said}"
        faults.append(fault)
    raise AssertionError


def _moment(chance, done, last, ranks):
    """Within the next few steps, so that all kills happen before the run's end."""
    step = min(done + chance.randint(1, 2 * SAVE_EVERY), last - 1)
    if chance.random() < 0.5:
        return f"kill@rank={chance.randrange(ranks)},step={step}"
    # rank 0 alone saves; the second of two numbers lies within the calls of any save
    step = min(-(-(done + 1) // SAVE_EVERY) * SAVE_EVERY, last // SAVE_EVERY * SAVE_EVERY)
    return f"kill@rank=0,step={step},phase=save,call={chance.randint(1, 25)}"


def noting_resources():
    """The run, with a line every few steps: memory, file descriptors, threads, entries of /dev/shm."""
    step = fit.train_step

    def noted(state, *args, **kwargs):
        result = step(state, *args, **kwargs)
        if state.step % 5 == 0 and os.environ.get("RANK", "0") == "0":
            with Path(os.environ["RESOURCES"]).open("a") as file:
                file.write(json.dumps(resources(state.step)) + "\n")
        return result

    fit.train_step = noted
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
    """Samples of `resources` from all the processes of a run that was killed and started again."""
    noted = folder.with_suffix(".resources")
    random_kills(
        folder, ranks, kills, epochs=epochs, seed=seed, main=noting_resources,
        environment={"RESOURCES": str(noted)}, more=("data.loader=torch", "data.workers=1"),
    )  # fmt: skip
    return [json.loads(line) for line in noted.read_text().splitlines()]
