"""The examples of parts of one's own run, are short, and name a command that is right."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hpc_supcon.config import load_config
from tests.own_code import install, run

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS = ["own_encoder.py", "own_loss.py", "own_policy.py", "own_probe.py"]
SMALL = [
    "train.epochs=1",
    "data.train_images=300",
    "data.batch_size=60",
    "report.embeddings=false",
    "report.html=false",
]


def commands(file: str) -> list[list[str]]:
    """The overrides of the commands in a file's docstring."""
    text = (EXAMPLES / file).read_text()
    return [shlex.split(line)[3:] for line in re.findall(r"^hpc-supcon run quickstart .*", text, re.MULTILINE)]


@pytest.mark.parametrize("file", [*PARTS, "plugin/my_plugin.py", "plugin/pyproject.toml"])
def test_it_has_at_most_25_lines(file):
    assert len((EXAMPLES / file).read_text().splitlines()) <= 25


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("file", PARTS)
def test_its_command_is_right(file, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    found = commands(file)
    assert found
    for overrides in found:
        load_config("quickstart", overrides, stages=("pretrain", "probe"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_of_them_together(tmp_path, ranks):
    for file in PARTS:
        shutil.copy(EXAMPLES / file, tmp_path)
    overrides = [override for file in PARTS for command in commands(file) for override in command]
    code, err = run(tmp_path, "run", "quickstart", *SMALL, *overrides, "run_dir=r", ranks=ranks)
    assert code == 0, err
    results = json.loads((tmp_path / "r/results.json").read_text())["results"]
    assert [result["probe"] for result in results] == ["own_probe.ClassMeans", "knn"]
    assert results[0]["test"]["accuracy"] > 0.3


def test_the_plugin(tmp_path):
    pytest.importorskip("setuptools")
    site = install(EXAMPLES / "plugin", tmp_path)
    code, err = run(
        tmp_path, "run", "quickstart", *SMALL, *commands("plugin/my_plugin.py")[0], "run_dir=r", site=site
    )
    assert code == 0, err
    assert '"version": "my-plugin 1.0"' in (tmp_path / "r/parts.json").read_text()
