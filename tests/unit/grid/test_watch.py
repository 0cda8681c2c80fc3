"""`grid status --watch`: one table in a terminal, a table for each change in a log."""

from __future__ import annotations

import time

import pytest
from rich.console import Console
from rich.text import Text

from hpc_supcon.cli import grid as commands
from hpc_supcon.grid import folder, node_state, status
from hpc_supcon.grid.node_state import NodeState
from tests.commands import run

SHOW_CURSOR = "\x1b[?25h"
LOOKS = [
    {"a": NodeState("pending"), "b": NodeState("pending")},
    {"a": NodeState("running", "node-1"), "b": NodeState("pending")},
    {"a": NodeState("running", "node-2"), "b": NodeState("pending")},
    {"a": NodeState("done"), "b": NodeState("failed")},
]


@pytest.fixture
def looks(monkeypatch):
    """What remains to be looked at."""
    left = list(LOOKS)
    monkeypatch.setattr(folder, "load", lambda grid_dir: None)
    monkeypatch.setattr(node_state, "node_states", lambda frozen: left.pop(0))
    monkeypatch.setattr(
        status, "render", lambda frozen, states, rows: Text(" ".join(state.state for state in states.values()))
    )
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return left


def test_a_log_gets_a_line_for_each_change(looks, tmp_path, capsys):
    said = "pending pending\nrunning pending\ndone failed\n"
    assert run(capsys, "grid", "status", tmp_path, "--watch") == (0, said, "")
    assert not looks


def test_a_terminal_ends_with_the_last_table(looks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "output", lambda: Console(force_terminal=True, width=80))
    code, out, _ = run(capsys, "grid", "status", tmp_path, "--watch")
    assert code == 0
    assert out.removesuffix(SHOW_CURSOR).endswith("done failed\n")
    assert not looks


def test_without_it_one_look_is_shown(looks, tmp_path, capsys):
    assert run(capsys, "grid", "status", tmp_path) == (0, "pending pending\n", "")
    assert len(looks) == len(LOOKS) - 1
