"""`hpc-supcon bench gpu`: budget, limits, what is kept and repeated, the page, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hpc_supcon.bench.gpu import device_check, runner, tests_stage
from hpc_supcon.bench.gpu.plan import STAGES, check_budget, chosen_stages, limit
from hpc_supcon.bench.gpu.record import DONE, FAILED, NO_TIME, TOO_SLOW, Record, read
from hpc_supcon.bench.gpu.report import page, table, write_report
from hpc_supcon.bench.gpu.work import Work
from hpc_supcon.cli import main
from hpc_supcon.errors import ConfigError, MissingExtra

H100 = {"cuda": True, "torch": "2.11.0", "name": "H100", "capability": [9, 0], "free": 79 << 30, "whole": 80 << 30}
BY_NAME = {stage.name: stage for stage in STAGES}


# ---- the budget


def test_the_limits_of_stages_that_use_them_up_add_up_to_the_budget():
    left, limits = 540.0, {}
    for i, stage in enumerate(STAGES):
        limits[stage.name] = limit(left, STAGES[i:])
        left -= limits[stage.name]
    assert left == pytest.approx(0)
    assert limits == pytest.approx(
        {"machine": 25, "tests": 100, "loss": 120, "step": 140, "data": 50, "training": 105}
    )


def test_what_a_stage_leaves_goes_to_all_later_ones():
    before = limit(515, STAGES[1:])
    after = limit(515 + 20, STAGES[1:])
    assert before < after < before + 20
    assert limit(300, STAGES[-1:]) == 300, "the last one gets all"


def test_a_stage_that_cannot_get_its_least_is_not_started():
    (last,) = STAGES[-1:]
    assert limit(last.least - 1, [last]) == 0
    assert limit(last.least, [last]) == last.least


def test_the_smallest_budget_gives_every_stage_its_least():
    least = sum(stage.least for stage in STAGES)
    assert least <= 120
    check_budget(least, STAGES)
    with pytest.raises(ConfigError, match="does not suffice: machine, tests, loss, step, data, training need"):
        check_budget(least - 1, STAGES)
    assert [stage.name for stage in chosen_stages(["data", "machine"])] == ["machine", "data"]


# ---- stages in processes


class Patient(subprocess.Popen):
    """Its limit is over as soon as the process says that it hangs."""

    ready = ""

    def wait(self, timeout=None):
        if timeout is None:
            return super().wait()
        Path(self.ready).read_text()
        raise subprocess.TimeoutExpired(self.args, timeout)


HANGS = """
import json, subprocess, sys
path, ready = sys.argv[1:]
content = json.load(open(path))
content["tables"]["loss"] = [{"name": "dense", "n": 16}]
json.dump(content, open(path, "w"))
open(path.replace("3-loss", ".3-loss") + ".partial-0", "w").close()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
sys.stderr.write("still at it")
sys.stderr.flush()
open(ready, "w").close()
child.wait()
"""


def test_a_stage_that_hangs_is_killed_with_its_children_and_what_it_measured_is_kept(tmp_path, monkeypatch):
    ready, alive = tmp_path / "ready", os.pipe()
    os.mkfifo(ready)
    out = tmp_path / "out"
    out.mkdir()
    stage = BY_NAME["loss"]
    monkeypatch.setattr(Patient, "ready", str(ready))
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *a, **k: Patient(*a, **k, pass_fds=[alive[1]]))
    command = [sys.executable, "-c", HANGS, str(out / stage.file), str(ready)]
    monkeypatch.setattr(runner, "stage_command", lambda *a: command)
    runner.run_stage(stage, out, "cpu", None, 60.0)
    os.close(alive[1])
    with os.fdopen(alive[0]) as pipe:
        assert pipe.read() == "", "ends once nobody holds the other end"
    content = read(out / stage.file)
    assert (content["status"], content["stderr"]) == (TOO_SLOW, ["still at it"])
    assert content["tables"]["loss"] == [{"name": "dense", "n": 16}]
    assert [path.name for path in out.iterdir()] == [stage.file]
    assert "**Killed** at its limit of 60 s; what it had measured is below" in page({"loss": content})


def test_a_command_that_is_ended_ends_its_stage_and_leaves_a_page(tmp_path, monkeypatch):
    class Ended(Patient):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            Path(self.ready).read_text()
            return os.kill(os.getpid(), signal.SIGTERM)

    ready, alive, handler = tmp_path / "ready", os.pipe(), signal.getsignal(signal.SIGTERM)
    os.mkfifo(ready)
    out = tmp_path / "out"
    monkeypatch.setattr(Patient, "ready", str(ready))
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *a, **k: Ended(*a, **k, pass_fds=[alive[1]]))
    command = [sys.executable, "-c", HANGS, str(out / BY_NAME["loss"].file), str(ready)]
    monkeypatch.setattr(runner, "stage_command", lambda *a: command)
    with pytest.raises(SystemExit) as ended:
        runner.bench_gpu(60.0, out, "cpu", ["loss"], None)
    assert ended.value.code == 128 + signal.SIGTERM
    os.close(alive[1])
    with os.fdopen(alive[0]) as pipe:
        assert pipe.read() == ""
    text = (out / "report.md").read_text()
    assert "Cut off together with the whole command." in text
    assert "| dense | 16 |" in text
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_stage_that_fails_is_noted_with_exit_code_and_last_lines(tmp_path, monkeypatch):
    program = "import sys; print(*range(99), sep=chr(10), file=sys.stderr); sys.exit(7)"
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(runner, "stage_command", lambda *a: command)
    runner.run_stage(BY_NAME["loss"], tmp_path, "cpu", None, 60.0)
    content = read(tmp_path / BY_NAME["loss"].file)
    assert (content["status"], content["exit_code"]) == (FAILED, 7)
    assert content["stderr"] == [str(i) for i in range(99 - runner.LINES, 99)]


@pytest.fixture
def stages(monkeypatch):
    """Stages that end at once: with the status in `ends`, or done; returns (those that ran, their limits, `ends`)."""
    ran, limits, ends = [], {}, {}

    def run_stage(stage, out, kind, data, seconds):
        ran.append(stage.name)
        limits[stage.name] = seconds
        Record.start(out / stage.file, stage.name, kind, seconds).end(ends.get(stage.name, DONE), 0.0)

    monkeypatch.setattr(runner, "run_stage", run_stage)
    return ran, limits, ends


def test_only_what_is_not_done_is_run_again_unless_it_is_named(tmp_path, stages):
    ran, limits, ends = stages
    ends |= {"loss": FAILED, "data": TOO_SLOW}
    assert not runner.bench_gpu(540, tmp_path, "cpu", [], None)
    assert ran == [stage.name for stage in STAGES]
    first = dict(limits)
    assert first["machine"] < first["loss"] < first["training"] > 500, "nothing was used up"
    ran.clear()
    ends.clear()
    assert runner.bench_gpu(540, tmp_path, "cpu", [], None)
    assert ran == ["loss", "data"]
    assert limits["loss"] > first["loss"], "the budget is shared by what is left to do"
    ran.clear()
    assert runner.bench_gpu(540, tmp_path, "cpu", ["step", "machine"], None)
    assert ran == ["machine", "step"]
    ran.clear()
    assert runner.bench_gpu(540, tmp_path, "cpu", [], None)
    assert ran == []
    ends |= {"loss": FAILED}
    assert not runner.bench_gpu(540, tmp_path, "cpu", ["loss"], None)
    assert not runner.bench_gpu(BY_NAME["loss"].least, tmp_path, "cpu", [], None), "enough for what is left to do"
    assert len(list(tmp_path.iterdir())) == len(STAGES) + 1


def test_a_stage_without_time_is_noted_and_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "stage_command", None)
    runner.run_stage(BY_NAME["loss"], tmp_path, "cpu", None, 0.0)
    assert read(tmp_path / BY_NAME["loss"].file)["status"] == NO_TIME


# ---- one stage at work


@pytest.fixture
def work(tmp_path):
    record = Record.start(tmp_path / "3-loss.json", "loss", "cpu", 60.0)
    return Work(record, torch.device("cpu"), float("inf"), tmp_path, None)


def test_what_cannot_be_measured_leaves_the_rest_and_every_number_is_on_disk_at_once(work, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    work.device = torch.device("cuda")
    for what, error in [
        ("pml", MissingExtra("pip install it")),
        ("dense, N 65536", torch.OutOfMemoryError("CUDA out of memory")),
        ("compiled", ValueError("a fault\nand more")),
    ]:
        with work.measuring(what):
            raise error
    with work.measuring("tiled"):
        work.record.row("loss", name="tiled", n=16)
        content = read(work.out / "3-loss.json")
    assert content["tables"]["loss"] == [{"name": "tiled", "n": 16}]
    assert [(entry["what"], entry["why"]) for entry in content["skipped"]] == [
        ("pml", "pip install it"),
        ("dense, N 65536", "out of memory; other processes hold 77.0 GiB of the GPU"),
    ]
    assert content["failures"] == [{"what": "compiled", "error": "ValueError: a fault"}]
    assert work.failed == ["compiled"]
    assert "Traceback" in capsys.readouterr().err


def test_what_takes_longer_than_is_left_is_noted(work):
    assert work.has_time("N 64", 100)
    work.deadline = float("-inf")
    assert not work.has_time("N 64", 100)
    (entry,) = read(work.out / "3-loss.json")["skipped"]
    assert entry == {"what": "N 64", "why": "takes about 100 s, 0 s were left"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tests/a.py::test_b[1-x] PASSED       [  3%]", ("passed", "tests/a.py::test_b[1-x]")),
        ("tests/a.py::test_b SKIPPED (needs a CUDA device) [ 50%]", ("skipped", "tests/a.py::test_b")),
        ("[gw3] [ 12%] FAILED tests/a.py::test_b[PASSED] ", ("failed", "tests/a.py::test_b[PASSED]")),
        ("tests/a.py::test_b ERROR  [100%]", ("error", "tests/a.py::test_b")),
        ("FAILED tests/a.py::test_b - assert 1 == 2", None),
        ("E   ValueError: PASSED [ 3", None),
    ],
)
def test_outcomes_are_read_from_the_lines_of_pytest(line, found):
    assert tests_stage.outcome(line) == found


def test_only_files_with_tests_for_a_gpu_are_given_to_pytest():
    files = [word for word in tests_stage.command() if word.endswith(".py")]
    assert "tests/unit/views/test_device.py" in files
    assert "tests/unit/grid/test_submit.py" not in files


# ---- the page


def content(stage, status=DONE, **more):
    base = {"stage": stage, "device": "cuda", "status": status, "seconds": 9.0, "limit_s": 10.0}
    return {**base, "facts": {}, "tables": {}, "skipped": [], "failures": [], **more}


def loss_row(name, n, seconds, **more):
    row = {"name": name, "n": n, "d": 128, "seconds": seconds, "tflops": 6e-12 * n * n * 128 / seconds}
    return {**row, "extra_bytes": 150e6, "host_s": 100e-6, **more}


MEASURED = {
    "loss": content(
        "loss",
        tables={
            "loss": [
                loss_row("dense", 16384, 13e-3), loss_row("triton-bf16", 16384, 1e-3, host_s=170e-6),
                loss_row("dense", 4096, 1e-3), loss_row("triton-bf16", 4096, 2e-3),
                loss_row("triton-bf16", 65536, 8e-3),
            ]
        },
        skipped=[{"what": "compiled, N 16384, D 128", "why": "out of | memory"}],
    ),
    "step": content(
        "step", FAILED, exit_code=1, stderr=["Traceback", "KeyError: 'x'"],
        tables={"step": [
            {"encoder": "resnet18", "image_size": 32, "mode": "eager", "batch_size": 64, "views_per_s": 70e3},
            {"encoder": "resnet18", "image_size": 32, "mode": "compile", "batch_size": 64, "views_per_s": 95e3},
        ]},
    ),
    "training": content("training", tables={"accuracy": [
        {"accuracy": 0.83, "seconds": 60.0, "epochs": 20, "probe": "knn", "data": "c", "encoder": "resnet18"}]}),
}  # fmt: skip


def test_the_page_says_of_each_target_what_was_measured_and_whether_it_is_met():
    lines = page(MEASURED).splitlines()
    verdicts = {
        line.split(" | ")[0][2:]: tuple(line.removesuffix(" |").split(" | ")[1:])
        for line in lines[lines.index("## Targets") : lines.index("## Versions and ceilings")]
    }

    def of(words):
        (found,) = [verdict for text, verdict in verdicts.items() if words in text]
        return found

    assert of("12 times") == ("13.00x (1.000 ms, dense 13.000 ms)", "yes")
    assert of("torch.compile") == (r"not measured: out of \| memory", "not measured")
    assert of("350 TFLOP/s") == ("412 TFLOP/s", "yes")
    assert of("N 4,096") == ("0.50x (2.000 ms, dense 1.000 ms)", "**no**")
    assert of("200 MB") == ("150 MB", "yes")
    assert of("host time") == ("170 us at most (N 16,384)", "**no**")
    assert of("resnet18, 32 px") == ("95,000 views/s (compile, batch 64), the goal of 90,000 too", "yes")
    assert of("resnet50") == ("not measured: stage step: failed", "not measured")
    assert of("5 million") == ("not measured: stage data did not run", "not measured")
    assert of("95 %")[1] == "not measured", "no target is missed by a run that had no time"


def test_the_page_says_why_no_accuracy_was_measured():
    skipped = [{"what": "training on real images", "why": "no --data: give CIFAR-10"}]
    text = page({"training": content("training", skipped=skipped)})
    assert "95 % in under 8 minutes | not measured: no --data: give CIFAR-10 | not measured |" in text


def test_the_page_tells_what_failed_and_what_was_not_measured_and_its_tables_are_even(tmp_path):
    text = page(MEASURED)
    assert "**Failed** after 9 s with exit code 1." in text
    assert "```\nTraceback\nKeyError: 'x'\n```" in text
    assert r"| compiled, N 16384, D 128 | out of \| memory |" in text
    assert "This stage did not run." in text
    widths = [line.replace(r"\|", "").count("|") for line in text.splitlines()]
    assert all(a == b for a, b in pairwise(widths) if a and b)
    assert table(["a"], [["x\ny"]]) == ["| a |", "| --- |", "| x y |"]


def test_on_a_cpu_no_target_is_judged():
    on_cpu = {name: {**found, "device": "cpu"} for name, found in MEASURED.items()}
    assert page(on_cpu).count("| no GPU | not measured |") == 10


def test_the_page_is_made_anew_from_the_files_alone(tmp_path, capsys):
    for name, found in MEASURED.items():
        (tmp_path / BY_NAME[name].file).write_text(json.dumps(found))
    write_report(tmp_path)
    first = (tmp_path / "report.md").read_text()
    assert first == page(MEASURED)
    (tmp_path / "report.md").unlink()
    with pytest.raises(SystemExit) as done:
        main(["bench", "gpu", "--page", "--out", str(tmp_path)])
    assert not done.value.code
    assert (tmp_path / "report.md").read_text() == first


# ---- bad input


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["bench", "gpu", *map(str, arguments)])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"cuda": False, "torch": "2.11.0"}, "--device cuda, but PyTorch 2.11.0 sees no CUDA device"),
        ({**H100, "name": "V100", "capability": [7, 0]}, "V100 has compute capability 7.0, and the kernels need 8.0"),
        ({**H100, "free": 1 << 30}, "H100 has 1.0 of 80.0 GiB free, the rest is held by other processes"),
    ],
)
def test_a_gpu_that_cannot_be_measured_is_refused_in_one_line(found, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(device_check, "ask", lambda: found)
    monkeypatch.setattr(runner, "run_stage", None)
    assert message in refused(capsys, "--device", "cuda", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if found["cuda"]:
        refused(capsys, "--out", tmp_path / "out")


def test_without_a_gpu_auto_is_the_cpu_and_with_one_cuda(monkeypatch):
    monkeypatch.setattr(device_check, "ask", lambda: {"cuda": False, "torch": "2.11.0"})
    assert device_check.check_device("auto") == "cpu"
    monkeypatch.setattr(device_check, "ask", lambda: H100)
    assert device_check.check_device("auto") == device_check.check_device("cuda") == "cuda"


def test_other_bad_input_is_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "run_stage", None)
    assert "did you mean 'loss'" in refused(capsys, "--only", "los")
    assert "--device is gpu; use auto, cpu or cuda" in refused(capsys, "--device", "gpu")
    assert "--budget 30 does not suffice" in refused(capsys, "--budget", 30)
    assert "--budget nan does not suffice" in refused(capsys, "--budget", "nan")
    assert "has no folders train and test" in refused(capsys, "--data", tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert "cannot be made" in refused(capsys, "--device", "cpu", "--out", file)
    assert "holds no numbers" in refused(capsys, "--page", "--out", tmp_path)
    Record.start(tmp_path / BY_NAME["loss"].file, "loss", "cuda", 1.0)
    assert "measured on cuda, not cpu; choose another folder" in refused(capsys, "--device", "cpu", "--out", tmp_path)
    (tmp_path / BY_NAME["loss"].file).write_text("{")
    assert "cannot be read as numbers of a stage" in refused(capsys, "--device", "cpu", "--out", tmp_path)
