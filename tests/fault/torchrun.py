"""Whole runs with injected faults under a real torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hpc_supcon import checkpoint

from ..processes import RUN_TIMEOUT_S
from .runs import SETTINGS


class Torchrun:
    def __init__(self, ranks, folder, *more, fault="", stage="pretrain"):
        self.folder, self._stderr = folder, folder.with_suffix(".stderr")
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*start, "-m", "tests.fault.injector", stage, "default", *SETTINGS, f"run_dir={folder}", *more]
        with self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, "HPC_SUPCON_FAULT": fault},
            )

    @property
    def stderr(self):
        return self._stderr.read_text()

    def end(self):
        return self.process.wait(RUN_TIMEOUT_S)

    def workers(self):
        """{rank: pid} of the processes of this run, without torchrun's own."""
        found = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != self.process.pid and self._is_ours(path):
                environment = _read(path / "environ").split("\0")
                rank = next((text[5:] for text in environment if text.startswith("RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(path.name)
        return found

    def _is_ours(self, path):
        return f"run_dir={self.folder}" in _read(path / "cmdline").split("\0")

    def survivors(self):
        return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and self._is_ours(p)]

    def wait_until_none_survives(self):
        self._wait(lambda: not self.survivors())

    def wait_for_a_checkpoint(self):
        self._wait(lambda: checkpoint.list_steps(self.folder / "checkpoints"))

    def _wait(self, condition):
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)


def _read(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
