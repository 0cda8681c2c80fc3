"""Dockerfile, apptainer.def and environment.yml: they cannot be built here, and must not drift from the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from hpc_supcon import __version__

ROOT = Path(__file__).parents[2]
PYTHON_OF = {"ubuntu24.04": "3.12"}
SETUP = ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg")


def joined(text: str) -> list[str]:
    """Lines without comments, with those that end in a backslash joined to the next, and single spaces."""
    whole = re.sub(r"\\\n", " ", text)
    lines = (" ".join(line.split()) for line in whole.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) in order."""
    return [tuple(line.split(" ", 1)) for line in joined((ROOT / "Dockerfile").read_text())]


def apptainer(section: str) -> list[str]:
    text = (ROOT / "apptainer.def").read_text()
    found = re.search(rf"^%{section}\n((?:[ \t].*\n|\n)+)", text, re.MULTILINE)
    assert found, section
    return joined(found[1])


def docker_commands() -> list[str]:
    return [part for name, line in dockerfile() if name == "RUN" for part in line.split(" && ")]


def pythons() -> list[str]:
    classifiers = SETUP["metadata"]["classifiers"]
    return re.findall(r"Python :: (3\.\d+)", classifiers)


def test_the_two_images_are_made_by_the_same_commands():
    [base] = [line for name, line in dockerfile() if name == "FROM"]
    assert f"\nFrom: {base}\n" in (ROOT / "apptainer.def").read_text()
    exports, commands = apptainer("post")[0], apptainer("post")[1:]
    assert commands == docker_commands()
    [variables] = [line.split() for name, line in dockerfile() if name == "ENV"]
    [path] = apptainer("environment")
    assert {*exports.split()[1:], path.removeprefix("export ")} == set(variables)
    assert apptainer("files") == [line for name, line in dockerfile() if name == "COPY"] == ["dist /opt/dist"]
    assert apptainer("runscript") == ['exec hpc-supcon "$@"']
    assert ("ENTRYPOINT", '["hpc-supcon"]') in dockerfile()


def test_what_is_copied_is_what_make_dist_makes_and_docker_is_sent():
    [dist] = re.findall(r"^dist:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "rm -rf dist" in dist, "a second wheel there would be no argument for pip"
    assert "-m build --no-isolation\n" in dist
    assert "twine check --strict dist/*" in dist
    assert joined((ROOT / ".dockerignore").read_text()) == ["*", "!dist"]


def test_the_base_image_has_the_cuda_that_the_extra_of_dali_is_for_and_a_python_that_is_tested():
    [base] = [line for name, line in dockerfile() if name == "FROM"]
    major, minor, system = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-cudnn-devel-(\w+\.\d+)", base).groups()
    assert SETUP["options.extras_require"]["dali"].split()[0].startswith(f"nvidia-dali-cuda{major}{minor}>=")
    assert PYTHON_OF[system] in pythons()


def test_the_images_have_every_extra_that_needs_a_machine_of_its_own():
    [extras] = re.findall(r"\*\.whl\)\[([\w,]+)\]", docker_commands()[-1])
    assert set(extras.split(",")) <= set(SETUP["options.extras_require"])
    assert set(extras.split(",")) >= {"ffcv", "dali", "deepspeed"}


def test_ffcv_is_compiled_with_what_the_tests_and_the_error_install():
    from hpc_supcon.data.loaders.ffcv import INSTALL

    needed = set(re.search(r"apt-get install ([\w +-]+) &&", INSTALL)[1].split())
    script = (ROOT / "tests/loaders/install-extras.sh").read_text()
    assert needed <= set(re.search(r"apt-get install .*--no-install-recommends ([\w +-]+) >", script)[1].split())
    [install] = [line for line in docker_commands() if line.startswith("apt-get install")]
    assert needed | {"slurm-client"} <= set(install.split())


def test_the_dockerfile_passes_its_linter():
    """Which also reads its shell commands (ShellCheck), and so those of apptainer.def."""
    linter = shutil.which("hadolint", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("needs hadolint: make check installs it")
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_pythons_of_conda_pip_and_the_classifiers_are_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    first, last = pythons()[0], pythons()[-1]
    assert pythons() == [f"3.{minor}" for minor in range(int(first[2:]), int(last[2:]) + 1)]
    assert SETUP["options"]["python_requires"] == f">={first}"
    assert f"python>={first},<3.{int(last[2:]) + 1}" in environment["dependencies"]
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}
    assert SETUP["mypy"]["python_version"] == first
    assert f'"py{first.replace(".", "")}"' in (ROOT / "ruff.toml").read_text()


def test_the_version_is_that_of_the_citation():
    """Everything else reads it from hpc_supcon/__init__.py."""
    assert SETUP["metadata"]["version"] == "attr: hpc_supcon.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
