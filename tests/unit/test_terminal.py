"""Text of a user's (paths, names, labels) appears on the terminal as it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.table import Table

import hpc_supcon
from hpc_supcon import terminal
from hpc_supcon.grid.charts import draw
from hpc_supcon.grid.tables import TableData
from hpc_supcon.training.metrics import ProgressLine
from tests.commands import run
from tests.unit.cli.test_app import FAST

ROOT = Path(hpc_supcon.__file__).parent
NAMES = ["r/[tcl]a", "r/x[/a]y", "[bold red]x", "a:smile:b", "[link=https://example.org]x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_line_and_a_table_show_a_name_as_it_is(name, capsys):
    terminal.note(f"{name}: going on")
    terminal.warn(f"{name}: is odd")
    ProgressLine(1, 1, shown=True).print(f"{name}: stopped")
    table = Table("heading", title=name, caption=name)
    table.add_row(name)
    terminal.output().print(table)
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"{name}: going on", f"{name}: is odd", f"{name}: stopped"]
    assert out.count(name) == 3


def test_a_run_in_a_folder_whose_name_looks_like_markup_is_told_and_resumed(capsys, tmp_path):
    folder = tmp_path / "x[/a]y" / "[tcl]a"
    arguments = ["run", "default", *FAST, "train.epochs=1", "probe.kind=knn", f"run_dir={folder}"]
    for more, told in (([], ""), (["--resume"], f"{folder}: going on from step")):
        code, out, err = run(capsys, *arguments, *more)
        assert code == 0, err
        assert f"results: {folder}/results.json" in out
        assert told in err
    code, out, _ = run(capsys, "checkpoints", f"{folder}")
    assert code == 0
    assert "verified" in out


def test_only_one_module_makes_consoles_and_bars():
    makers = {"Console", "Progress"}
    for path in ROOT.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        found = {call.id for call in calls if isinstance(call, ast.Name)} & makers
        # the progress bar of training has columns of its own, which read no markup
        allowed = {"terminal.py": {"Console", "Progress"}, "metrics.py": {"Progress"}}.get(path.name, set())
        assert found <= allowed, f"{path}: {found - allowed}: use hpc_supcon.terminal"


def test_no_column_of_a_bar_reads_markup():
    for path in ROOT.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "TextColumn":
                assert "markup" in {keyword.arg for keyword in call.keywords}, path


def test_a_chart_draws_a_label_with_dollar_signs_as_it_is(tmp_path, monkeypatch):
    """matplotlib reads "$...$" as a formula, and raises for one that it cannot parse."""
    texts = []
    printed = FigureCanvasAgg.print_png

    def print_png(canvas, path):
        texts.extend(text for text in canvas.figure.findobj() if hasattr(text, "get_parse_math"))
        printed(canvas, path)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    label = r"cost$\frac$US$"
    table = TableData(label, "scores", label, [label], [label], ("accuracy",))
    table.values[label, label, "accuracy"] = [0.5]
    table.expected[label, label] = 1
    draw(table, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not any(text.get_parse_math() for text in texts if label in text.get_text())
