"""A package `wandb` that writes what it is told to a file, or fails as $STUB_WANDB says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PACKAGE = """
import json, os, time
from types import SimpleNamespace

def _failing(where):
    if os.environ.get("STUB_WANDB") == f"block {where}":
        time.sleep(3600)
    if os.environ.get("STUB_WANDB") == f"raise {where}":
        raise RuntimeError("no such record\\nand more")
    if os.environ.get("STUB_WANDB") == f"exit {where}":
        os._exit(9)

def _write(**line):
    with open(os.environ["STUB_OUT"], "a") as file:
        file.write(json.dumps(line) + "\\n")

class Run:
    url, step = None, 0
    def __init__(self, id):
        self.id, self.summary = id, {}
        _write(call="init", id=id)
    def define_metric(self, *names, **options): pass
    def log(self, numbers, step):
        _failing("log")
        _write(call="log", step=step, values={n: v for n, v in numbers.items() if isinstance(v, (int, float))})
    def save(self, path, **options): _write(call="save", path=path)
    def finish(self, exit_code):
        _failing("finish")
        _write(call="finish", exit_code=exit_code)

Settings = Table = Image = Html = lambda *arguments, **options: None
setup = lambda: SimpleNamespace(settings=SimpleNamespace(base_url="http://127.0.0.1:9"))

def init(id, **options):
    _failing("init")
    return Run(id)
"""


def install(folder: Path, monkeypatch, behavior: str = "") -> Path:
    """Make the package for child processes and for the search of packages; returns the file that it writes."""
    (folder / "stub/wandb").mkdir(parents=True, exist_ok=True)
    (folder / "stub/wandb/__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder / "stub")
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "stub"), str(root), *filter(None, sys.path)]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("STUB_OUT", str(folder / "told.jsonl"))
    monkeypatch.setenv("STUB_WANDB", behavior)
    return folder / "told.jsonl"


def calls(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(path: Path, kind: str) -> list[int]:
    """The steps of a kind of event, in the order in which they were told."""
    lines = [line["values"] for line in calls(path) if line["call"] == "log"]
    return [values[f"{kind}/step"] for values in lines if f"{kind}/step" in values]
