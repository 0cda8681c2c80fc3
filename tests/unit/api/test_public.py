"""What is public: one list, documented, typed for mypy --strict, and cheap to import."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_supcon as hs
from hpc_supcon import api

ROOT = Path(hs.__file__).parents[1]
PUBLIC = [
    "Callback", "Config", "HpcSupconError", "Run", "StopTraining", "Table", "embed", "load", "pretrain", "probe",
    "prune", "report", "views",
]  # fmt: skip
OLDER = ("Config", "HpcSupconError")
"""Documented where they are used: their settings by `hpc-supcon config --schema`, errors by their one line."""
CODE = """
import sys
import hpc_supcon as hs
assert {"pretrain", "Run", "__version__"} <= set(dir(hs))
heavy = {"torch", "numpy", "pydantic", "rich", "hpc_supcon.api"} & set(sys.modules)
assert not heavy, heavy
from hpc_supcon import *
assert pretrain is hs.pretrain and "torch" in sys.modules
import hpc_supcon.pages.page, hpc_supcon.cli
assert callable(hs.report) and callable(hs.prune) and callable(hs.probe) and callable(hs.embed)
assert callable(hs.views)
try:
    hs.pretrian
except AttributeError as error:
    assert "'hpc_supcon' has no attribute 'pretrian'" in str(error)
else:
    raise AssertionError
"""
USER_SCRIPT = """
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import hpc_supcon as hs


class Stop(hs.Callback):
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics["loss"] < 1:
            raise hs.StopTraining("low")


def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return embeddings.sum()


run = hs.pretrain({"data.source": "digits"}, run_dir=Path("r"), encoder=nn.Identity(), loss=loss, callbacks=[Stop()])
assert_type(run, hs.Run)
assert_type(run.config.optim.lr, float)
assert_type(run.encoder, nn.Module)
assert_type(run.projection, nn.Module | None)
assert_type(run.plots, dict[str, Path])
assert_type(hs.probe(run, kind=["knn"]), hs.Table)
assert_type(hs.embed("r", torch.zeros(1)), Tensor)
assert_type(hs.report(run, "other"), Path)
assert_type(hs.views("quickstart", images=3), Tensor)
assert_type(run.export("onnx", "model.onnx"), Path)
assert_type(hs.load("r", encoder=lambda: nn.Identity()).metrics.columns, list[str])
assert_type(hs.prune(run, settings={"prune.rate": 0.5}), hs.Table)
hs.pretrain(callbacks=[1])  # type: ignore[list-item]
hs.pretrain(resume="yes")  # type: ignore[arg-type]
hs.pretian()  # type: ignore[attr-defined]
"""


def test_the_public_names_are_these():
    assert hs.__all__ == PUBLIC == api.__all__
    assert all(getattr(hs, name) is getattr(api, name) for name in PUBLIC)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in OLDER])
def test_every_public_name_has_arguments_errors_and_source_in_its_docstring(name):
    text = inspect.getdoc(getattr(hs, name))
    for section in ("Args:", "Raises:", "Source:"):
        assert f"\n{section}\n" in text, f"{name} has no {section}"
    if inspect.isfunction(getattr(hs, name)):
        assert "\nReturns:\n" in text
        arguments = inspect.signature(getattr(hs, name)).parameters
        missing = [argument for argument in arguments if f"{argument}:" not in text and f"{argument}," not in text]
        assert not missing


@pytest.mark.parametrize("cls", [hs.Run, hs.Table, hs.Callback])
def test_every_public_method_is_documented(cls):
    members = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    assert members
    assert not [name for name, member in members.items() if not inspect.getdoc(member)]


def test_importing_it_imports_nothing_else_and_names_are_functions_for_good():
    subprocess.run([sys.executable, "-c", CODE], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_script_of_a_user_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    (tmp_path / "empty.ini").write_text("[mypy]\n")
    options = ["--strict", "--follow-imports=silent", f"--config-file={tmp_path / 'empty.ini'}"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", str(script)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
