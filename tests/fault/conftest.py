from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ..processes import RUN_TIMEOUT_S
from . import runs

BESIDE_OTHERS = (
    "test_agreement.py",
    "test_agreement_locks.py",
    "test_full_disk.py",
    "test_own_error.py",
    "test_system_limits.py",
)
"""Files whose tests wait for nothing that a busy machine delays; all others run beside tests/slurm at most."""


def pytest_collection_modifyitems(items):
    """Whole runs of several processes: on a busy machine one test may take many times as long."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(4 * RUN_TIMEOUT_S))
            if item.path.name not in BESIDE_OTHERS:
                item.add_marker(pytest.mark.alone)
                item.add_marker(pytest.mark.xdist_group("fault"))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """(ranks, *settings) -> folder of a run without faults."""
    made = {}

    def of(ranks, *settings):
        if (ranks, settings) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "r"
            runs.run(ranks, folder, *settings)
            made[ranks, settings] = folder
        return made[ranks, settings]

    return of


@pytest.fixture
def small_disk(tmp_path, request):
    """A real file system of 2 MB, or of the size that is given by indirect parametrization."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '2m')}", "none", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"NOT CHECKED on a real full disk: mounting is refused here ({done.stderr.strip()})")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
