"""A real Slurm for the test session: two nodes on this machine, started and stopped by slurm/local-cluster.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from .grids import LONG, grid, states, weights, write_grid

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch", "srun", "squeue", "sacct", "scancel")
PACKAGES = "slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core"


def processes_of(folder: Path) -> list[str]:
    """Command lines of all live processes that the cluster in `folder` started, including jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_LOCAL_OWNER={folder}\0".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def cluster():
    """Sets SLURM_CONF for this process. The folder's path is short, since the paths of Unix sockets must be."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        reason = f"SLURM IS NOT INSTALLED ({', '.join(missing)}) AND NOT TESTED. As root: apt-get install {PACKAGES}"
        if os.environ.get("HPC_SUPCON_REQUIRE_EXTRAS") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("SLURM", "SBATCH", "SUBMITIT"))}
    for name in kept:
        del os.environ[name]
    os.environ["SLURM_LOCAL_DIR"] = str(folder)
    script = ROOT / "slurm" / "local-cluster.sh"
    started = subprocess.run([script, "start"], capture_output=True, text=True, check=False)
    try:
        assert started.returncode == 0, started.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        assert subprocess.run([script, "status"], check=False, capture_output=True).returncode == 0
        # jobs find this checkout and this Python; many small processes on few cores want one thread each
        os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        os.environ["OMP_NUM_THREADS"] = "1"
        yield folder
    finally:
        subprocess.run([script, "stop"], check=True)
        for name in ("SLURM_CONF", "SLURM_LOCAL_DIR"):
            os.environ.pop(name, None)
        os.environ.update(kept)
        left = processes_of(folder)
        shutil.rmtree(folder)
    assert not left, "the cluster left processes behind"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Weights of the LONG cell, run in this process without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    grid("submit", write_grid(folder, "g", set=LONG), "--cluster", "debug", "--dir", folder / "debug")
    assert set(states(folder / "debug").values()) == {"done"}
    return weights(folder / "debug" / "runs" / "cell")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.alone)
            item.add_marker(pytest.mark.xdist_group("slurm"))  # there is one cluster
