"""What Weights & Biases and MLflow hold of a run, read back from their own files."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from hpc_supcon.config import flatten, load_config
from hpc_supcon.metric_file import read_events
from hpc_supcon.run_folder import read_config
from hpc_supcon.tracking import processes
from hpc_supcon.tracking.record import row_of
from hpc_supcon.training.metrics import MetricLog
from tests.loaders.extras import require
from tests.run_folders import full_run

ARTIFACTS = ("page", "pictures", "checkpoints")

READ_MLFLOW = """
import json, os, sys
from pathlib import Path
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
runs = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
def artifacts(run, path=None):
    for found in client.list_artifacts(run, path):
        if found.is_dir: yield from artifacts(run, found.path)
        else: yield found.path
print(json.dumps([{
    "status": r.info.status, "params": r.data.params, "tags": r.data.tags,
    "metrics": {n: [[m.step, m.value] for m in client.get_metric_history(r.info.run_id, n)] for n in r.data.metrics},
    "artifacts": sorted(artifacts(r.info.run_id)),
} for r in runs]))
"""

# the file of a run is a log of LevelDB: blocks of 32 KiB of records, after a header of 7 bytes
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2 as pb
def records(content):
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0:
            break
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield pb.Record.FromString(whole)
            whole = b""
def items(found):
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in found}
parts = []
for path in sorted(Path(sys.argv[1]).glob("offline-run-*/*.wandb")):
    part = {"id": None, "config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in records(path.read_bytes()):
        if record.HasField("run"):
            part["id"] = record.run.run_id
            part["config"] |= items(record.run.config.update)
        if record.HasField("history"):
            part["history"].append(items(record.history.item))
        if record.HasField("summary"):
            part["summary"] |= items(record.summary.update)
        if record.HasField("artifact"):
            part["artifacts"].append([record.artifact.type, record.artifact.name])
    parts.append(part)
print(json.dumps(parts))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    monkeypatch.setattr(processes, "QUIET_S", 600)  # on a busy machine a line more would say that it takes long
    folder = full_run(tmp_path / "run [b]", "seed=3")
    (folder / "plots").mkdir()
    (folder / "plots/training.png").write_bytes(_png())
    (folder / "report.html").write_text("<!doctype html><p>page")
    (folder / "checkpoints/step-20/model.safetensors").write_bytes(b"weights")
    return folder


def _png():
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(out, "png")
    return out.getvalue()


def resumed_with(folder, name):
    """The run of `folder`, of 20 steps, is told to a tracker; then it is resumed from step 18 and trained to 24."""
    settings = load_config("default", [f"log.to=[{name}]"]).log
    with processes.following(folder, [name], ARTIFACTS):
        pass
    with processes.following(folder, [name], ARTIFACTS), MetricLog(folder, settings, resumed_at=18) as log:
        log.log("start", 18, host="node8")
        for step in range(20, 25, 2):
            log.log(
                "train", step, epoch=step // 2 - 1, loss=5 - step / 10, images_per_s=512.0, data_wait=0.25, lr=0.1
            )
        log.log("validation", 20, loss=3.5, accuracy=0.7)
        log.log("embedding", 24, space="encoder", nmi=0.5, ari=math.nan, confusion=[[1, 2]])
        log.log("probe", 24, probe="linear", test={"accuracy": 0.75, "top5": None})


def expected(folder):
    """name -> [(step, value)] of all numbers in metrics.jsonl, in order."""
    numbers: dict[str, list] = {}
    for event in read_events(folder / "metrics.jsonl"):
        row = row_of(event)
        for name, value in row.numbers.items():
            numbers.setdefault(name, []).append([row.step, value])
    return numbers


def read(code, where):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(where)], capture_output=True, check=True)
    return json.loads(done.stdout)


def same(a, b):
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # NaN is equal to NaN


def test_mlflow_holds_all_numbers_settings_and_files_of_a_resumed_run(folder, capfd):
    require("mlflow", "pip install 'hpc-supcon[mlflow]'", "its tracker")
    resumed_with(folder, "mlflow")
    (run,) = read(READ_MLFLOW, (folder / "mlruns").as_uri())
    metrics = {name: found for name, found in run["metrics"].items() if not name.startswith("results/")}
    assert [step for step, _ in metrics["train/loss"]] == list(range(2, 25, 2))
    assert same(metrics, expected(folder))
    assert run["metrics"]["results/linear/test/accuracy"][-1] == [0, 0.75]
    assert run["status"] == "FINISHED"
    assert run["params"] == {name: str(value) for name, value in flatten(read_config(folder)).items()}
    assert run["tags"]["start/host"] == "node8"
    assert {
        "config.yaml", "metrics.jsonl", "results.json", "scores.json", "report.html", "plots/training.png",
        "checkpoints/step-20/model.safetensors",
    } <= set(run["artifacts"])  # fmt: skip
    assert capfd.readouterr().err.splitlines()[0].startswith("mlflow: run ")


def test_mlflow_writes_where_its_variables_say(folder, tmp_path, monkeypatch):
    require("mlflow", "pip install 'hpc-supcon[mlflow]'", "its tracker")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    with processes.following(folder, ["mlflow"], []):
        pass
    assert not (folder / "mlruns").exists()
    (run,) = read(READ_MLFLOW, (tmp_path / "store").as_uri())
    assert len(run["metrics"]["train/loss"]) == 10


def test_a_server_of_mlflow_that_does_not_answer_is_told_in_a_line(folder, monkeypatch, capfd):
    require("mlflow", "pip install 'hpc-supcon[mlflow]'", "its tracker")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(processes, "GRACE_S", 600)
    monkeypatch.setattr(processes, "FINISHING_S", 1)
    with processes.following(folder, ["mlflow"], []):
        pass
    lines = [line for line in capfd.readouterr().err.splitlines() if "hpc-supcon track" in line]
    assert len(lines) == 1


def test_wandb_holds_all_numbers_settings_and_files_of_a_resumed_run_without_a_key(folder, capfd):
    require("wandb", "pip install 'hpc-supcon[wandb]'", "its tracker")
    resumed_with(folder, "wandb")
    parts = read(READ_WANDB, folder / "wandb")
    assert len({part["id"] for part in parts}) == 1
    history = [line for part in parts for line in part["history"]]
    rows = [line["_step"] for line in history]
    assert rows == sorted(set(rows))
    found: dict[str, list] = {}
    for line in history:
        steps = [value for name, value in line.items() if name.endswith("/step")]
        for name, value in line.items():
            if isinstance(value, (int, float)) and steps and "/" in name and not name.endswith("/step"):
                found.setdefault(name, []).append([steps[0], float(value)])
    assert [step for step, _ in found["train/loss"]] == list(range(2, 25, 2))
    numbers = expected(folder)
    assert found.keys() == numbers.keys()
    assert same(found, numbers)
    config = {name: value for part in parts for name, value in part["config"].items()}
    assert (config["seed"], config["loss"]["name"]) == (3, "supcon_out")
    summary = {name: value for part in parts for name, value in part["summary"].items()}
    assert summary["results/linear/test/accuracy"] == 0.75
    assert summary["start/host"] == "node8"
    kinds = {name: value for line in history for name, value in line.items() if name.endswith("/_type")}
    assert kinds == {
        "results/_type": "table-file", "plots/training.png/_type": "image-file", "report.html/_type": "html-file",
    }  # fmt: skip
    assert ["model", f"checkpoint-{parts[0]['id']}"] in [a for part in parts for a in part["artifacts"]]
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0] == err[1]
    assert err[0].startswith("wandb: no API key (`wandb login`, or WANDB_API_KEY); kept in ")


def test_wandb_with_a_key_and_no_network_is_kept_in_the_run_folder(folder, monkeypatch, capfd):
    require("wandb", "pip install 'hpc-supcon[wandb]'", "its tracker")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with processes.following(folder, ["wandb"], []):
        pass
    (part,) = read(READ_WANDB, folder / "wandb")
    assert len([line for line in part["history"] if "train/loss" in line]) == 10
    assert "http://127.0.0.1:9 cannot be reached" in capfd.readouterr().err
