"""Large grids, as commands: expanding and watching 10,000 cells, submitting 500.

    eval "$(slurm/local-cluster.sh start)"
    python benchmarks/grid.py -o benchmarks/results/grid.json

The jobs are held, so that none of them starts, and cancelled at the end. Of the 10,000 cells half are given the
records and run folders of cells that are done. Times are of the whole command, Python's start included; `cpu` is what
it and Slurm's commands computed themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from hpc_supcon.bench.common import machine
from hpc_supcon.config import yaml12
from hpc_supcon.grid.folder import NodeRecord, load, submitted_jobs, write_record

AXES = {
    "loss.name": ["supcon_in", "supcon_out", "tcl", "simclr", "cross_entropy"],
    "optim.lr": [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0],
    "loss.temperature": [0.05, 0.07, 0.1, 0.2, 0.5],
    "prune.rate": [None, 0.2, 0.4, 0.5],
}
LARGE = {"name": "large", "base": "quickstart", "seeds": 10, "axes": AXES}
MIDDLE = {"name": "middle", "base": "quickstart", "seeds": 10, "axes": {k: AXES[k] for k in list(AXES)[:2]}}
HELD = {"cluster": "slurm", "sbatch": {"hold": True}}
TARGETS = {"expand, 10,000 cells": 2.0, "submit, 500 cells": 5.0, "status, 10,000 cells": 3.0}


def timed(command: list[str]) -> dict[str, float]:
    """Seconds by the clock and of computing, this process's children included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpc_supcon", "grid", *command], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def write(folder: Path, name: str, content: dict[str, Any]) -> str:
    (folder / name).write_text(yaml12.dumps(content), encoding="utf-8")
    return str(folder / name)


def half_done(root: Path) -> None:
    """Give every second pre-training and its probe the traces of having run."""
    frozen, jobs = load(root), submitted_jobs(root)
    for cell in frozen.cells[::2]:
        for name in cell.nodes:
            frozen.run_folder(frozen.nodes[name]).mkdir(exist_ok=True)
            write_record(root, name, NodeRecord("done", jobs[name], "node", 1, time.time() - 60, time.time()))


def measure(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    large, middle = write(folder, "large.yaml", LARGE), write(folder, "middle.yaml", MIDDLE)
    profile = write(folder, "profile.yaml", HELD)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TARGETS}
    try:
        for i in range(rounds):
            found["expand, 10,000 cells"].append(timed(["expand", large]))
            submit = ["submit", middle, "--profile", profile, "--dir", str(folder / f"middle-{i}")]
            found["submit, 500 cells"].append(timed(submit))
        timed(["submit", large, "--profile", profile, "--dir", str(folder / "large")])
        half_done(folder / "large")
        for _ in range(rounds):
            found["status, 10,000 cells"].append(timed(["status", str(folder / "large")]))
    finally:
        for root in folder.glob("*/grid.json"):
            subprocess.run([sys.executable, "-m", "hpc_supcon", "grid", "cancel", str(root.parent)], check=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    about = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.rounds)
    load_average = os.getloadavg()[0]
    record = {"date": date.today().isoformat(), "machine": about, "load": load_average, "seconds": found}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, target in TARGETS.items():
        wall, cpu = ([r[kind] for r in found[name]] for kind in ("wall", "cpu"))
        print(
            f"{name:>22}: {statistics.median(wall):.2f} s (best {min(wall):.2f}, worst {max(wall):.2f}; computing "
            f"{statistics.median(cpu):.2f}), wanted: under {target:.0f} s"
        )


if __name__ == "__main__":
    main()
