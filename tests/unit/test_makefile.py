"""What `make` and the commit hooks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def recipe(target):
    """The commands of a target of the Makefile."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{target}:"))
    end = next(i for i, line in enumerate(lines[start + 1 :], start + 1) if not line.startswith("\t"))
    text = "\n".join(line.strip() for line in lines[start + 1 : end])
    return text.replace("$(BIN)", ".venv/bin").replace(" && ", "\n").splitlines()


MARKER = "pytest.mark.alone"


def test_the_commit_hooks_run_what_make_lints():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}, "needs no network"
    assert [hook["entry"] for hook in hooks] == recipe("lint")
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_make_test_runs_every_test_once():
    shared, alone = [line for line in recipe("test") if "pytest" in line]
    variables = dict(line.split(" = ", 1) for line in (ROOT / "Makefile").read_text().splitlines() if " = " in line)
    folders = variables["ALONE"].split()
    assert shared.endswith('-m "not alone"')
    assert alone.endswith("-m alone $(ALONE)")
    marking = {
        str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/*/conftest.py") if MARKER in path.read_text()
    }
    assert marking == set(folders), "tests marked in another folder would never run"


PROGRAM = """
import multiprocessing, os, subprocess, sys
from counted import parts

if __name__ == "__main__":
    for method in ("forkserver", "spawn"):
        process = multiprocessing.get_context(method).Process(target=getattr(parts, method))
        process.start(), process.join()
    subprocess.run([sys.executable, "-c", "from counted import parts; parts.command()"], check=True)
    if os.fork() == 0:
        parts.forked()
        os._exit(0)
    os.wait()
"""
PARTS = ("forkserver", "spawn", "command", "forked", "nothing")


def test_lines_that_only_other_processes_run_are_counted_and_too_few_fail(tmp_path):
    (tmp_path / "counted").mkdir()
    functions = "".join(f"def {name}():\n    name = '{name}'\n    print(name)\n" for name in PARTS)
    (tmp_path / "counted" / "parts.py").write_text(functions)
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = (ROOT / "setup.cfg").read_text().replace("source = hpc_supcon", "source = counted")
    (tmp_path / "setup.cfg").write_text(settings)
    (tmp_path / "build/coverage").mkdir(parents=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}

    def coverage(*words):
        line = [sys.executable, "-m", "coverage", *words]
        environment = {**variables, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(line, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert coverage("run", "program.py").returncode == 0
    assert coverage("combine", "-q").returncode == 0
    report = coverage("report", "--show-missing")
    assert ["15", "2", "86.7%", "14-15"] in [line.split()[1:] for line in report.stdout.splitlines()]
    assert report.returncode == 2


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_quickstart_has_a_rank_for_each_gpu_at_most_two_and_two_without(tmp_path, gpus, ranks):
    (tmp_path / "torch.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {gpus})\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "RANKS"}
    command = ["make", "--dry-run", "quickstart", f"BIN={tmp_path}"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert f"--nproc_per_node {ranks} -m hpc_supcon run" in printed


@pytest.mark.parametrize(
    ("arguments", "venv", "install"),
    [
        (
            ["unit", "VENV=.venv-3.13"],
            ".venv-3.13",
            ".venv-3.13/bin/python -m pip install -q --disable-pip-version-check",
        ),
        (["oldest"], ".venv-oldest", "uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct"),
    ],
)
def test_another_python_and_the_oldest_versions_have_an_environment_of_their_own(tmp_path, arguments, venv, install):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", "--dry-run", *arguments, "PYTHON=python3.99"]
    # without the options of the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    options = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    printed = subprocess.run(command, **options).stdout
    assert f"python3.99 -m venv {venv}\n" in printed
    assert f"{install} -e .[dev]\n" in printed
    assert f"\n{venv}/bin/python -m pytest " in printed
    assert ".venv/" not in printed, "the environment of the developer is not touched"
