"""Submission, with fake commands of Slurm: what is submitted, and what is never submitted twice."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from hpc_supcon.cli import main
from hpc_supcon.config import yaml12
from hpc_supcon.errors import ConfigError, LaunchError, RunFolderError
from hpc_supcon.grid import slurm, worker
from hpc_supcon.grid.arrays import make_arrays
from hpc_supcon.grid.cells import load as load_grid
from hpc_supcon.grid.expand import expand
from hpc_supcon.grid.folder import (
    FrozenNode,
    NodeRecord,
    append_submission,
    freeze,
    load,
    local_queue_id,
    lock,
    submitted_jobs,
    write_record,
)
from hpc_supcon.grid.node_state import cancel, node_states
from hpc_supcon.grid.schema import ClusterProfile, Resources
from hpc_supcon.grid.submit import check_profile, submit

GOLDEN = Path(__file__).parents[2] / "golden" / "grid.sbatch"
GRID = {
    "name": "g",
    "base": "quickstart",
    "axes": {"loss.name": ["supcon_in", "tcl", "simclr"]},
    "resources": {"pretrain": {"nodes": 2, "gpus": 4, "cpus": 8, "minutes": 90}, "probe": {"gpus": 1}},
}
SBATCH = """#!/bin/sh
test -e "$FAKE/refuse-$(grep -c . "$FAKE/ids")" && {
  echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1; }
id=$((1000 + $(grep -c . "$FAKE/ids")))
cp "$1" "$FAKE/$id.sh"; echo $id >>"$FAKE/ids"
echo "Submitted batch job $id"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of fake commands that log their arguments; squeue and sacct print what is in their files."""
    fake = tmp_path / "fake"
    fake.mkdir()
    commands = {"sbatch": SBATCH, "scancel": '#!/bin/sh\necho "$@" >>"$FAKE/cancelled"\n', "srun": "#!/bin/sh\n"}
    commands |= {
        name: f'#!/bin/sh\necho "$@" >>"$FAKE/{name}.arguments"; cat "$FAKE/{name}.txt"\n'
        for name in ("squeue", "sacct")
    }
    for name, text in commands.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    for name in ("ids", "squeue.txt", "sacct.txt"):
        (fake / name).touch()
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def frozen(tmp_path):
    """frozen(profile=..., cluster="slurm", **keys) -> a frozen grid in a folder with a blank in its path."""

    def make(profile=None, cluster="slurm", **keys):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml12.dumps({**GRID, **keys}))
        plan = expand(load_grid(path))
        return freeze(
            tmp_path / "my grid", plan, path.read_text(), cluster, profile or ClusterProfile(cluster="slurm")
        )

    return make


def log(line):
    pass


def test_each_stage_is_one_array_with_dependencies_and_only_stage_and_paths_are_pickled(cluster, frozen):
    grid = frozen()
    assert submit(grid, ["missing"], log) == 6
    jobs = submitted_jobs(grid.root)
    assert [jobs[cell.nodes[0]] for cell in grid.cells] == ["1000_0", "1000_1", "1000_2"]
    assert [jobs[cell.nodes[1]] for cell in grid.cells] == ["1001_0", "1001_1", "1001_2"]
    for name, job in jobs.items():
        pickled = DelayedSubmission.load(grid.root / "jobs" / f"{job}_submitted.pkl")
        node = grid.nodes[name]
        assert pickled.function is worker.run_nodes
        assert pickled.args == (node.stage, str(grid.config(node)), str(grid.run_folder(node)), ())
        assert not pickled.kwargs


def test_the_batch_file_is_the_golden_one(cluster, frozen):
    grid = frozen(
        ClusterProfile(cluster="slurm", partition="gpu", setup=("module load x",), environment={"A": "b c"})
    )
    submit(grid, ["missing"], log)
    text = (cluster / "1000.sh").read_text() + "=====\n" + (cluster / "1001.sh").read_text()
    shown = text.replace(str(grid.root), "/GRID").replace(sys.executable, "PYTHON")
    assert shown == GOLDEN.read_text()


def test_submitting_again_submits_only_what_is_missing_or_failed(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    jobs = submitted_jobs(grid.root)
    first, second, third = (cell.nodes for cell in grid.cells)
    for name in first:  # the first cell is done, the probe of the second failed, the third is in the queue
        write_record(grid.root, name, NodeRecord("done", jobs[name]))
        grid.run_folder(grid.nodes[name]).mkdir(exist_ok=True)
    write_record(grid.root, second[0], NodeRecord("done", jobs[second[0]]))
    grid.run_folder(grid.nodes[second[0]]).mkdir(exist_ok=True)
    write_record(grid.root, second[1], NodeRecord("failed", jobs[second[1]], error="it broke"))
    (cluster / "squeue.txt").write_text("1000_2|RUNNING|None\n1001_[2%64]|PENDING|Dependency\n")
    states = node_states(grid)
    assert [states[name].state for name in (*first, *second, *third)] == [
        "done", "done", "done", "failed", "running", "pending",
    ]  # fmt: skip
    assert states[second[1]].detail == "it broke"
    assert submit(grid, ["missing", "failed"], log) == 1
    assert submitted_jobs(grid.root)[second[1]] == "1002"
    assert "dependency" not in (cluster / "1002.sh").read_text()
    (cluster / "squeue.txt").write_text("1000_2|RUNNING|None\n1001_2|PENDING|Dependency\n1002|PENDING|Priority\n")
    assert submit(grid, ["missing", "failed"], log) == 0


def test_a_failed_parent_is_submitted_again_with_its_children(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    jobs = submitted_jobs(grid.root)
    parent, child = grid.cells[1].nodes
    write_record(grid.root, parent, NodeRecord("failed", jobs[parent], error="no"))
    (cluster / "squeue.txt").write_text(
        "\n".join(f"{j}|RUNNING|None" for j in ("1000_0", "1000_2", "1001_0", "1001_2"))
    )
    (cluster / "sacct.txt").write_text(f"{jobs[child]}|CANCELLED by 0|Dependency\n")
    states = node_states(grid)
    assert (states[parent].state, states[child].state) == ("failed", "blocked")
    assert submit(grid, ["failed"], log) == 2
    assert submitted_jobs(grid.root)[child] == "1003"
    assert "#SBATCH --dependency=afterok:1002" in (cluster / "1003.sh").read_text()


def test_a_child_depends_on_a_parent_that_is_in_the_queue_already(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    child = grid.cells[1].nodes[1]
    queue = [f"{job}|RUNNING|None" for name, job in submitted_jobs(grid.root).items() if name != child]
    (cluster / "squeue.txt").write_text("\n".join(queue))
    (cluster / "sacct.txt").write_text(f"{submitted_jobs(grid.root)[child]}|CANCELLED|None\n")
    assert node_states(grid)[child].state == "cancelled"
    submit(grid, ["cancelled"], log)
    assert "#SBATCH --dependency=afterok:1000_1" in (cluster / "1002.sh").read_text()


def test_when_sbatch_fails_nothing_stays_in_the_queue_and_its_message_is_shown(cluster, frozen):
    grid = frozen()
    (cluster / "refuse-1").touch()  # the second array
    with pytest.raises(LaunchError, match=r"sbatch refused probe: .*Invalid account"):
        submit(grid, ["missing"], log)
    assert (cluster / "cancelled").read_text().split() == ["1000"]
    (cluster / "sacct.txt").write_text("1000_[0-2]|CANCELLED by 0|None\n")
    assert {node_states(grid)[name].state for name in grid.nodes} <= {"cancelled", "missing"}
    (cluster / "refuse-1").unlink()
    assert submit(grid, ["missing", "cancelled"], log) == 6


def test_without_slurm_no_folder_is_made(monkeypatch, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(yaml12.dumps(GRID))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(["grid", "submit", str(tmp_path / "grid.yaml"), "--cluster", "slurm", "--dir", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_grid_that_ran_locally_can_continue_on_the_cluster(cluster, frozen):
    here, dead, theirs = socket.gethostname(), 2**22 + 1, "elsewhere"  # above the kernel's greatest process id
    grid = frozen(cluster="local")
    names = list(grid.nodes)
    jobs = [
        f"{here}:{dead}",
        f"{here}:{os.getpid()}",
        f"queue:{here}:{dead}",
        local_queue_id(),
        f"queue:{theirs}:{dead}",
    ]
    append_submission(grid.root, "pretrain", dict(zip(names, jobs, strict=False)))
    wanted = ["lost", "pending", "missing", "pending", "pending", "missing"]
    assert [node_states(grid)[name].state for name in names] == wanted
    assert not list(cluster.glob("*.arguments")), "Slurm is not asked about them"
    grid = frozen(cluster="slurm")
    assert [node_states(grid)[name].state for name in names] == wanted
    with pytest.raises(LaunchError, match="press Ctrl-C there"):
        cancel(grid, {names[1]})
    submit(grid, ["lost", "missing"], log)
    assert {name for name, job in submitted_jobs(grid.root).items() if slurm.is_job(job)} >= {
        name for name, state in zip(names, wanted, strict=True) if state != "pending"
    }


def test_the_state_of_the_owners_jobs_is_read_whoever_asks(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    node_states(grid)
    owner = f"--user={(grid.root / 'jobs').stat().st_uid}"
    assert all(owner in (cluster / f"{name}.arguments").read_text() for name in ("squeue", "sacct"))


def test_a_job_without_an_entry_in_sacct_is_lost(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    state = node_states(grid)[grid.cells[0].nodes[0]]
    assert (state.state, "sacct has no entry" in state.detail) == ("lost", True)


def test_a_deleted_run_folder_is_run_again(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    name = grid.cells[0].nodes[0]
    write_record(grid.root, name, NodeRecord("done", submitted_jobs(grid.root)[name]))
    assert (node_states(grid)[name].state, node_states(grid)[name].detail) == (
        "missing",
        "its run folder was deleted",
    )


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ("NODE_FAIL", "failed"), ("OUT_OF_MEMORY", "failed"), ("TIMEOUT", "failed"), ("CANCELLED by 7", "cancelled"),
        ("COMPLETED", "lost"),
    ],
)  # fmt: skip
def test_jobs_that_left_the_queue_without_a_record(cluster, frozen, found, state):
    grid = frozen()
    submit(grid, ["missing"], log)
    (cluster / "sacct.txt").write_text(f"1000_[0-1,2]|{found}|None\n1000_0.batch|COMPLETED|\n")
    assert {node_states(grid)[cell.nodes[0]].state for cell in grid.cells} == {state}


def test_only_one_process_has_the_lock_and_the_error_names_it(tmp_path, python):
    code = (
        "import sys, time; from pathlib import Path; from hpc_supcon.grid.folder import lock\n"
        f"with lock(Path({str(tmp_path)!r})):\n    print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RunFolderError, match=f"process {other.pid} is submitting"), lock(tmp_path, wait_s=0):
            pass
        other.kill()  # the kernel releases the lock
        other.wait()
        with lock(tmp_path, wait_s=0):
            pass


def test_a_folder_takes_the_same_grid_or_a_larger_one(cluster, frozen):
    grid = frozen()
    submit(grid, ["missing"], log)
    larger = frozen(axes={"loss.name": ["supcon_in", "tcl", "simclr", "supcon_out"]})
    assert set(grid.nodes) < set(larger.nodes)
    assert load(grid.root) == larger
    with pytest.raises(RunFolderError, match="holds another grid"):
        frozen(set={"train.epochs": 7})


def test_more_than_the_cluster_has_is_refused_before_submission(frozen, monkeypatch):
    nodes = frozen().nodes.values()
    for profile, words in [
        (ClusterProfile(cluster="slurm", gpus_per_node=2), "requests gpus: 4, the cluster has at most 2"),
        (ClusterProfile(cluster="slurm", nodes=1), "nodes: 2"),
        (ClusterProfile(cluster="slurm", minutes=80), "minutes: 90"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_profile(nodes, profile, "slurm")
    with pytest.raises(ConfigError, match="nodes: 2"):
        check_profile(nodes, ClusterProfile(cluster="local", gpus_per_node=4), "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="requests gpus: 4, this machine has at most 2"):
        check_profile(nodes, ClusterProfile(cluster="local"), "local")


@pytest.mark.parametrize(("pack", "longest"), [(1, 1000), (3, 2), (2, 1)])
def test_arrays_run_every_node_once_and_children_have_the_index_of_their_parent(pack, longest):
    draw = random.Random(0)
    small, large = Resources(), Resources(minutes=7)
    nodes = []
    for i in range(23):
        nodes.append(FrozenNode(f"{i}.pretrain", "pretrain", str(i), None, draw.choice([small, large]), ""))
        for k in range(draw.randrange(4)):
            stage = draw.choice(["probe", "prune"])
            nodes.append(
                FrozenNode(f"{i}-{k}.{stage}", stage, f"{i}-{k}", f"{i}.pretrain", draw.choice([small, large]), "")
            )
    arrays = make_arrays(nodes, pack, longest)
    assert sorted(n.name for a in arrays for job in a.jobs for n in job) == sorted(n.name for n in nodes)
    for array in arrays:
        assert len(array.jobs) <= longest
        assert all(len(job) <= pack for job in array.jobs)
        assert {(n.stage, n.resources) for job in array.jobs for n in job} == {(array.stage, array.resources)}
        for i, job in enumerate(array.jobs):
            parents = [node.parent for node in job]
            assert parents == ([n.name for n in array.parent.jobs[i]] if array.parent else [None] * len(job))


def test_the_output_of_slurm_is_parsed():
    text = "12_[3-5,7%2]|PENDING|Priority\n12_1|RUNNING|None\n99|CANCELLED by 0|None\n\n"
    states = slurm._states(text)
    assert {job for job, s in states.items() if s.state == "PENDING"} == {"12_3", "12_4", "12_5", "12_7"}
    assert (states["12_1"].state, states["99"].state) == ("RUNNING", "CANCELLED")


def test_the_id_of_an_array_task_is_not_that_of_the_array(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert slurm.own_job() == "12_4"


def test_the_pickles_of_jobs_are_in_a_folder_where_nobody_else_may_write(cluster, frozen):
    grid = frozen()
    jobs = grid.root / "jobs"
    assert stat.S_IMODE(jobs.stat().st_mode) == 0o700
    jobs.chmod(0o770)
    with pytest.raises(RunFolderError, match="others can write there"):
        submit(grid, ["missing"], log)
    assert not list(jobs.iterdir())


def test_a_line_that_a_kill_tore_costs_no_other_submission(tmp_path):
    append_submission(tmp_path, "pretrain", {"a.pretrain": "1_0"})
    with (tmp_path / "submissions.jsonl").open("a") as file:
        file.write('{"time": 1.0, "stage": "probe", "jobs": {"a.pr')
    assert submitted_jobs(tmp_path) == {"a.pretrain": "1_0"}
    append_submission(tmp_path, "probe", {"a.probe": "2_0"})
    assert submitted_jobs(tmp_path) == {"a.pretrain": "1_0", "a.probe": "2_0"}
