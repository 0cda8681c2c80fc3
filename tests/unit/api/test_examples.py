"""The example of the Python API is short, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hpc_supcon as hs

SCRIPT = Path(hs.__file__).parents[1] / "examples" / "python_api.py"


def test_the_script_trains_until_its_time_is_up(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 25
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "stopped at step 1: time is up at loss" in done.stderr
    assert "torch.nn.modules.container:Sequential, supcon_out, digits, step 1, finished" in done.stdout
    assert "torch.Size([2, 32])" in done.stdout
    assert "torch.nn.modules.container:Sequential" in (tmp_path / "run" / "config.yaml").read_text()
