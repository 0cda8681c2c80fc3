"""The package as it is released: built from a copy of the checkout, and installed where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: object, **options) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of all that git knows, or would add, in a repository of its own with one commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: an unpacked archive does not say which of its files are others'")
    folder = tmp_path_factory.mktemp("checkout")
    listed = call("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "m"]):
        call(*git, *arguments)
    return folder


@pytest.fixture(scope="session")
def built(checkout) -> Path:
    """The folder in which `make dist` leaves its two files."""
    tools = Path(sys.executable).parent
    # with the tools of these tests, not an environment of its own; and without the options of the make that runs them
    as_if_made = ("--old-file", ".venv/.installed-dev")
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    call("make", "-C", checkout, "dist", f"BIN={tools}", *as_if_made, env=environment)
    return checkout / "dist"


class Installed:
    """A new environment in which the wheel is installed, with an empty home and an empty current folder."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.bin, self.here = folder / "venv/bin", folder / "here"
        self.here.mkdir()
        (folder / "home").mkdir()
        self._environment = {
            "HOME": str(folder / "home"),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        }
        site = next((folder / "venv/lib").glob("python*/site-packages"))
        # What the package needs comes from the environment of the tests, gigabytes of it. A line of a path file is a
        # path and no more: the path files there, such as that of an editable installation, are not read.
        there = [path for path in sys.path if path.endswith("-packages")]
        (site / "of_the_tests.pth").write_text("\n".join(there) + "\n")
        pip = [sys.executable, "-m", "pip", f"--python={self.bin / 'python'}", "install", "-q"]
        call(*pip, "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check", wheel)

    def call(self, *command: object) -> str:
        """Standard output of a command of the environment that must succeed."""
        program, *arguments = command
        return call(self.bin / str(program), *arguments, cwd=self.here, env=self._environment)


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Installed:
    return Installed(next(built.glob("*.whl")), tmp_path_factory.mktemp("installed"))
