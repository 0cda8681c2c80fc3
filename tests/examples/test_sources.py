"""The examples of data sets of one's own run as their first lines say, and are short."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own_code import run

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCES = ["own_dataset.py", "to_huggingface.py", "to_manifest.py", "to_webdataset.py"]
SMALL = [
    "train.epochs=2",
    "data.batch_size=60",
    "data.train_images=300",
    "report.embeddings=false",
    "report.html=false",
]


@pytest.mark.parametrize("file", SOURCES)
def test_it_runs_and_is_short(file, tmp_path, monkeypatch):
    text = (EXAMPLES / file).read_text()
    assert len(text.splitlines()) <= 25
    if file != "own_dataset.py":
        pytest.importorskip({"to_huggingface.py": "datasets", "to_webdataset.py": "webdataset"}.get(file, "csv"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(EXAMPLES / file, tmp_path)
    for script in re.findall(r"^python (\S+)$", text, re.MULTILINE):
        subprocess.run([sys.executable, script], cwd=tmp_path, check=True, timeout=600)
    (command,) = re.findall(r"^hpc-supcon (run .*)$", text, re.MULTILINE)
    code, err = run(tmp_path, *shlex.split(command), *SMALL, "run_dir=r")
    assert code == 0, err
    results = json.loads((tmp_path / "r/results.json").read_text())["results"]
    assert results[0]["test"]["accuracy"] > 0.3
