"""The examples of adapters and of models that are given away run, and do what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import timm

import hpc_supcon
from tests.fault.runs import events

EXAMPLES = Path(hpc_supcon.__file__).parent.parent / "examples"


def example(python, name, *arguments):
    command = [python, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["lora.py", "push_and_load.py"])
def test_they_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 25


def test_adapters_are_trained_then_the_model_is_pushed_and_loaded(python, tmp_path):
    run_dir, folder = tmp_path / "run", tmp_path / "model"
    small = ("train.epochs=1", "report.embeddings=false", "report.html=false")
    assert "accuracy" in example(python, "lora.py", run_dir, "null", *small)
    (start,) = events(run_dir, "start")
    assert 0 < start["trained_parameters"] < start["parameters"] / 2
    out = example(python, "push_and_load.py", run_dir, folder)
    assert float(out.partition("difference of features: ")[2].split()[0]) < 1e-4
    assert f"model.weights={folder}" in out
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_features == 64
    again = tmp_path / "again"
    example(python, "lora.py", again, folder, *small)
    (event,) = events(again, "weights")
    assert event["path"] == f"{folder}/model.safetensors"
    assert (event["missing"], event["unexpected"]) == ([], [])
