"""`hpc-supcon doctor` says what is there, what is not, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hpc_supcon.bench import doctor
from hpc_supcon.cli import main
from hpc_supcon.environment import code_commit


def found(folder, topic):
    return next(f for f in doctor.findings(folder) if f.topic.startswith(topic))


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH of its own, empty at first; returns a function that puts a shell script there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, script):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return add


def test_every_finding_that_is_not_well_names_a_remedy(tmp_path, tools):
    every = list(doctor.findings(tmp_path))
    assert {f.topic for f in every} >= {
        "hpc_supcon",
        "PyTorch",
        "CPU",
        "memory",
        "shared memory",
        "Slurm",
        "compiler",
    }
    for f in every:
        assert f.text
        no_driver = f.topic == "GPU" and "driver" in f.text
        assert f.remedy or f.status == "ok" or no_driver, f
        assert not f.remedy or f.status != "ok", f
    assert not list(tmp_path.glob(".doctor-*"))


def test_slurm(tmp_path, tools):
    assert found(tmp_path, "Slurm").status == "absent"
    tools("sinfo", "echo gpu up 4; echo gpu down 1; echo cpu up 2")
    assert found(tmp_path, "Slurm") == doctor.Finding("Slurm", "ok", "partitions: cpu, gpu")
    tools("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    broken = found(tmp_path, "Slurm")
    assert (broken.status, broken.text) == ("problem", "slurm_load_partitions: Unable to contact slurm controller")


def test_extras_and_the_compiler(tmp_path, tools, monkeypatch):
    assert found(tmp_path, "compiler").status == "absent"
    tools("gcc", "exit 0")
    assert found(tmp_path, "compiler").status == "ok"
    monkeypatch.setattr(doctor, "is_installed", lambda module: module == "umap")
    assert found(tmp_path, "report.methods=[umap]").status == "ok"
    assert found(tmp_path, "data.loader=ffcv").remedy == "pip install 'hpc-supcon[ffcv]'"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert found(tmp_path, "storage").status == "problem"
    tmp_path.chmod(0o700)


def test_a_folder_that_does_not_exist(tmp_path):
    missing = found(tmp_path / "none", "storage")
    assert (missing.status, missing.text) == ("problem", "cannot be written: No such file or directory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this PyTorch cannot use one" in found(tmp_path, "GPU").text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA driver" in found(tmp_path, "GPU").text or "no GPU" in found(tmp_path, "GPU").text


def test_the_command_and_the_version_with_its_commit(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--folder", str(tmp_path)])
    assert "PyTorch" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    commit = code_commit()
    assert commit.startswith("version") or f"({commit})" in capsys.readouterr().out


def test_completion_is_offered():
    line = [sys.executable, "-m", "hpc_supcon"]
    asked = {"_HPC_SUPCON_COMPLETE": "complete_bash", "COMP_WORDS": "hpc-supcon prob", "COMP_CWORD": "1"}
    done = subprocess.run(line, check=False, env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["probe"]
