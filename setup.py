"""Metadata stands in setup.cfg. Here: source archives and wheels record the git commit that they are built from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent


def record_commit(root: Path) -> None:
    """Write the commit beside the copied modules, where `--version` finds it: see hpc_supcon/environment.py."""
    sys.path.insert(0, str(ROOT))  # a build's own path does not have it
    from hpc_supcon.environment import COMMIT_FILE, known_commit

    commit = known_commit()
    if commit is not None:
        (root / "hpc_supcon" / COMMIT_FILE).write_text(f"{commit}\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # whose modules are those of the checkout, and so is the commit
            record_commit(Path(self.build_lib))


class SourceArchive(sdist):
    def make_release_tree(self, base_dir: str, files: Any) -> None:
        super().make_release_tree(base_dir, files)
        record_commit(Path(base_dir))


setup(cmdclass={"build_py": BuildPy, "sdist": SourceArchive})
