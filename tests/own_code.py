"""Command lines in a folder with modules of a user's own, and packages that pip installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from hpc_supcon import cli
from tests.processes import Ranks


def main() -> None:
    """The command line in the folder HERE, with the packages in SITE."""
    os.chdir(os.environ["HERE"])
    sys.path += filter(None, [os.environ.get("SITE")])
    cli.main()


def run(here: Path, *arguments: str, ranks: int = 1, site: Path | str = "") -> tuple[int, str]:
    """(the exit code of all ranks, stderr)"""
    ended = Ranks(arguments, here / "stderr", ranks, environment={"HERE": here, "SITE": site}, main=main)
    codes = set(ended.end())
    assert len(codes) == 1, ended.stderr
    return codes.pop(), ended.stderr


def install(package: Path, folder: Path) -> Path:
    """Install a package with pip, without a network; returns the folder that it is in."""
    shutil.copytree(package, folder / "source")  # pip builds in the folder itself
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", folder / "site", folder / "source"], check=True, timeout=300)
    return folder / "site"
