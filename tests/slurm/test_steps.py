"""Two steps of one job, at the same time on the same node: each is a run of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from hpc_supcon.distributed.resolve import resolve
found = resolve()
with open(f"{sys.argv[1]}/{sys.argv[2]}-{found.rank}", "w") as file:
    file.write(f"{found.master_port} {found.run} {found.may_move}")
"""


def test_the_ranks_of_a_step_have_one_port_and_the_steps_of_a_job_have_two(cluster, tmp_path):
    program, script = tmp_path / "program.py", tmp_path / "job.sh"
    program.write_text(PROGRAM)
    first, second = (f"srun --overlap --ntasks=2 {sys.executable} {program} {tmp_path} {name}" for name in "ab")
    script.write_text(f"#!/bin/sh\n{first} & first=$!\n{second} & second=$!\nwait $first && wait $second\n")
    command = ["sbatch", "--wait", "--nodes=1", "--ntasks=2", f"--output={tmp_path}/log", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    ranks = {f"{step}-{rank}": (tmp_path / f"{step}-{rank}").read_text() for step in "ab" for rank in (0, 1)}
    assert ranks["a-0"] == ranks["a-1"]
    assert ranks["b-0"] == ranks["b-1"]
    ports, runs, may_move = zip(*(text.split() for text in ranks.values()), strict=True)
    assert (len(set(ports)), len(set(runs)), set(may_move)) == (2, 2, {"True"})
