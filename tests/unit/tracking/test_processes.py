"""A tracker has a process of its own: whatever it does, the run goes on and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hpc_supcon import cli
from hpc_supcon.config import load_config
from hpc_supcon.metric_file import read_events
from hpc_supcon.process import STATE, UNKNOWN, process_field
from hpc_supcon.tracking import processes
from hpc_supcon.tracking.state import read_state
from hpc_supcon.training.metrics import MetricLog
from tests.processes import Ranks
from tests.run_folders import write_events, write_run

from . import stub

TO_WANDB = load_config("default", ["log.to=wandb"]).log


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "run", results=False)
    write_events(folder, [])
    return folder


def train(folder, first=1, last=5, settings=TO_WANDB, **options):
    with MetricLog(folder, settings, **options) as log:
        for step in range(first, last + 1):
            log.log("train", step, loss=1.0 / step)


def test_all_events_of_several_stages_are_in_one_record(tmp_path, folder, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    with processes.following(folder, ["wandb"], []):
        train(folder)
        train(folder, 6, 9)
    assert stub.steps(out, "train") == list(range(1, 10))
    assert [line["call"] for line in stub.calls(out) if line["call"] in ("init", "finish")] == ["init", "finish"]
    assert [line["exit_code"] for line in stub.calls(out) if line["call"] == "finish"] == [0]


def test_a_resumed_run_has_the_same_record_with_every_step_once(tmp_path, folder, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    train(folder, 1, 4)
    processes.wait_for_all()
    train(folder, 3, 6, resumed_at=2)
    processes.wait_for_all()
    assert stub.steps(out, "train") == [1, 2, 3, 4, 5, 6]
    assert len({line["id"] for line in stub.calls(out) if line["call"] == "init"}) == 1
    rows = [line["step"] for line in stub.calls(out) if line["call"] == "log"]
    assert rows == sorted(set(rows))  # Weights & Biases drops what goes back


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize(
    ("behavior", "said"),
    [
        ("block", "wandb: not all was sent within 1 s; `hpc-supcon track {} log.to=wandb` sends the rest"),
        ("raise", "wandb: no such record and more; the run goes on, and tries again every 60 s"),
        ("exit", "wandb: its process ended with exit code 9; `hpc-supcon track {} log.to=wandb` sends what is miss"),
    ],
)
def test_a_tracker_that_fails_stops_nothing_and_loses_nothing(
    tmp_path, folder, monkeypatch, capfd, behavior, said, where
):
    out = stub.install(tmp_path, monkeypatch, f"{behavior} {where}")
    monkeypatch.setattr(processes, "FINISHING_S", 1 if behavior == "block" else 600)
    monkeypatch.setattr(processes, "GRACE_S", 600)
    with processes.following(folder, ["wandb"], []):
        train(folder)
    assert [event["step"] for event in read_events(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert said.format(folder) in capfd.readouterr().err
    monkeypatch.setenv("STUB_WANDB", "")
    done = subprocess.run([sys.executable, "-m", "hpc_supcon", "track", folder, "log.to=wandb"], check=False)
    assert done.returncode == 0
    assert stub.steps(out, "train") == [1, 2, 3, 4, 5]


def test_a_process_that_ignores_its_limit_is_killed(tmp_path, folder, monkeypatch, capfd):
    stub.install(tmp_path, monkeypatch)
    for name in ("QUIET_S", "GRACE_S", "FINISHING_S"):
        monkeypatch.setattr(processes, name, 0)
    with processes.following(folder, ["wandb"], []):
        train(folder)
        (process,) = processes._following[folder].processes.values()
        process.send_signal(signal.SIGSTOP)
    assert process.returncode == -signal.SIGKILL
    assert "wandb: its process did not end and was killed" in capfd.readouterr().err


def test_an_error_of_the_run_ends_the_record_as_unfinished_with_all_its_events(tmp_path, folder, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)

    def fail():
        with processes.following(folder, ["wandb"], ["page"]):
            train(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stub.steps(out, "train") == [1, 2, 3, 4, 5]
    assert stub.calls(out)[-1] == {"call": "finish", "exit_code": 1}
    assert not [line for line in stub.calls(out) if line["call"] == "save"]


def test_signals_of_the_run_do_not_end_the_tracker(tmp_path, folder, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    with processes.following(folder, ["wandb"], []):
        train(folder, 1, 1)
        (process,) = processes._following[folder].processes.values()
        while not stub.steps(out, "train"):  # it has set its signals by then
            os.sched_yield()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
        train(folder, 2, 5)
    assert stub.steps(out, "train") == [1, 2, 3, 4, 5]


def test_after_a_kill_of_the_run_its_last_events_are_sent(tmp_path, folder, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    code = (
        "import os, pathlib, sys\n"
        "from hpc_supcon.tracking import processes\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "processes.follow(folder, ['wandb'], [])\n"
        '(folder / \'metrics.jsonl\').write_text(\'{"event": "train", "step": 1}\\n\')\n'
        "process = processes._following[folder].processes['wandb']\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    # stderr is open until the process of the tracker has ended as well
    assert done.returncode == -signal.SIGKILL
    assert stub.steps(out, "train") == [1]
    assert process_field(int(done.stdout), STATE) in (UNKNOWN, "Z")


def test_a_refused_run_leaves_no_folder(tmp_path, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    with processes.following(tmp_path / "new", ["wandb"], []):
        pass
    assert not (tmp_path / "new").exists()
    assert stub.calls(out) == []


SMALL = [
    "pretrain", "quickstart", "data.source=synthetic",
    "data.synthetic={images: 64, classes: 2, channels: 1, image_size: 8}",
    "data.batch_size=16", "model.encoder=conv", "train.iterations=4", "log.every_steps=1", "log.to=[csv, wandb]",
    "log.tensorboard=false", "log.progress=false", "runtime.threads=1", "runtime.device=cpu",
]  # fmt: skip


def _main_with_stub():
    sys.path.insert(0, os.environ["STUB"])
    cli.main()


def _main_without_trackers():
    _main_with_stub()
    assert not {"wandb", "mlflow"} & set(sys.modules)


def test_two_ranks_tell_every_event_once_and_do_not_import_the_package(tmp_path, monkeypatch):
    out = stub.install(tmp_path, monkeypatch)
    names = ("PYTHONPATH", "WANDB_MODE", "STUB_OUT", "STUB_WANDB")
    environment = {name: os.environ[name] for name in names} | {"STUB": tmp_path / "stub"}
    arguments = [*SMALL, f"run_dir={tmp_path / 'run'}"]
    ranks = Ranks(arguments, tmp_path / "err", 2, environment=environment, main=_main_without_trackers)
    assert ranks.end() == [0, 0], ranks.stderr
    assert stub.steps(out, "train") == [1, 2, 3, 4]
    assert [line["call"] for line in stub.calls(out)].count("init") == 1
    rows = (tmp_path / "run/metrics-train.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2", "3", "4"]
    assert read_state(tmp_path / "run", "wandb").steps == {"train": 4}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_without_the_package_is_refused_before_its_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr("hpc_supcon.tracking.find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*SMALL, f"run_dir={tmp_path / 'run'}", f"log.to={name}"])
    assert (stopped.value.code, list(tmp_path.iterdir())) == (2, [])
    assert capsys.readouterr().err == (
        f"hpc-supcon: error: log.to={name} needs the package {name}: pip install 'hpc-supcon[{name}]'\n"
    )


def test_track_without_a_tracker_says_what_to_add(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["track", str(folder)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"hpc-supcon: error: {folder}: log.to names no tracker; add log.to=wandb or log.to=mlflow\n"
    )
