"""What `run` leaves for its page, and pages that follow a run as processes do."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from hpc_supcon import __version__, cli
from tests.commands import succeed
from tests.run_folders import write_run
from tests.unit.cli.test_app import FAST


def test_a_run_ends_with_its_page_and_records_how_it_was_started(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/hpc-supcon", "run", "a b=c"])
    succeed("run", "default", *FAST, f"run_dir={tmp_path}/r")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"page: {tmp_path}/r/report.html"
    html = (tmp_path / "r/report.html").read_text()
    start = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[0])
    assert start["command"] == "hpc-supcon run 'a b=c'"
    assert (start["device"], start["world_size"]) == ("cpu", 1)
    assert start["steps_per_epoch"] == start["train_images"] // 16
    assert start["host"]
    assert start["commit"]
    for text in ("hpc-supcon run &#39;a b=c&#39;", __version__, start["commit"]):
        assert text in html


def test_without_report_html_there_is_no_page(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["run", "default", *FAST, f"run_dir={tmp_path}/r", "report.html=false"])
    assert "page:" not in capsys.readouterr().out
    assert not (tmp_path / "r/report.html").exists()


def test_a_page_that_cannot_be_written_is_told_and_the_run_is_done(capsys, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/report.html").write_text("mine")
    succeed("run", "default", *FAST, f"run_dir={tmp_path}/r")
    assert "report.html exists already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "r/report.html").read_text() == "mine"


def test_watching_ends_at_ctrl_c_with_exit_code_0(python, tmp_path):
    folder = write_run(tmp_path / "run")
    command = [python, "-m", "hpc_supcon", "report", "--watch", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "report.html").exists():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)  # it may not end before
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{folder}/report.html\n"), err
    assert '<meta http-equiv="refresh"' not in (folder / "report.html").read_text()
