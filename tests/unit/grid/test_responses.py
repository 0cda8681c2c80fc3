"""The responses of a grid's runs: their means over seeds, read from the logs."""

from __future__ import annotations

import json
import statistics

import pytest
from matplotlib.figure import Figure

from hpc_supcon.config import yaml12
from hpc_supcon.grid.cells import load as load_grid
from hpc_supcon.grid.expand import expand
from hpc_supcon.grid.folder import freeze
from hpc_supcon.grid.report import write_report
from hpc_supcon.grid.responses import responses_of
from hpc_supcon.grid.schema import ClusterProfile

LOSSES = ["supcon_out", "tcl"]


@pytest.fixture
def grid(tmp_path):
    """Two losses, two probes that share a pre-training, three seeds."""
    path = tmp_path / "grid.yaml"
    axes = {"loss.name": LOSSES, "probe.kind": ["linear", "knn"]}
    table = {"title": "Gradient responses", "layout": "matrix", "rows": "loss.name", "columns": "probe.kind"}
    keys = {"name": "g", "base": "quickstart", "axes": axes, "seeds": 3, "tables": [table]}
    path.write_text(yaml12.dumps(keys))
    return freeze(tmp_path / "out", expand(load_grid(path)), "", "debug", ClusterProfile(cluster="debug"))


def value_of(loss, seed, step, kind):
    return 0.1 * LOSSES.index(loss) + 0.01 * seed**2 + step / 1000 + (kind == "negatives")


def write_log(frozen, cell, steps, **first):
    folder = frozen.run_folder(frozen.nodes[cell.nodes[0]])
    folder.mkdir(parents=True, exist_ok=True)
    events = [first] if first else []
    for step in steps:
        numbers = {
            f"response_{kind}": value_of(cell.labels["loss.name"], cell.seed, step, kind)
            for kind in ("positives", "negatives")
        }
        events.append({"event": "train", "step": step, "loss": 1.0, **numbers})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_curve_is_the_mean_over_the_seeds_of_each_loss(grid):
    for cell in grid.cells:
        write_log(grid, cell, (10, 20), event="train", step=10, response_positives=99.0, response_negatives=99.0)
    groups = responses_of(grid)
    assert [group.label for group in groups] == LOSSES
    for group in groups:
        for kind in ("positives", "negatives"):
            steps, intervals = group.curve(f"response_{kind}")
            assert steps == [10, 20]
            for step, (mean, half) in zip(steps, intervals, strict=True):
                values = [value_of(group.label, seed, step, kind) for seed in range(3)]
                assert mean == pytest.approx(statistics.fmean(values))  # 99 was before the step was trained again
                assert half == pytest.approx(4.30265 * statistics.stdev(values) / 3**0.5, rel=1e-4)


def test_steps_that_not_all_seeds_have_are_left_out(grid):
    for cell in grid.cells:
        write_log(grid, cell, (10, 20) if cell.seed else (10,))
    assert [group.curve("response_positives")[0] for group in responses_of(grid)] == [[10], [10]]


def test_the_report_has_the_figure_where_responses_were_logged(grid, tmp_path, monkeypatch):
    write_report(grid, tmp_path / "none")
    assert not (tmp_path / "none/gradient-responses.png").exists()
    assert "(gradient-responses.png)" not in (tmp_path / "none/report.md").read_text()
    for cell in grid.cells:
        write_log(grid, cell, (10, 20))
    figures = []
    create = Figure.subplots

    def kept(figure, *arguments, **options):
        figures.append(figure)
        return create(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "subplots", kept)
    write_report(grid, tmp_path / "report")
    charts = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert charts == {"gradient-responses.png", "gradient-responses-2.png"}  # the other is the table's
    assert "(gradient-responses.png)" in (tmp_path / "report/report.md").read_text()
    positives, negatives = figures[-1].axes
    assert [line.get_label() for line in positives.get_lines()] == LOSSES
    assert negatives.get_lines()[1].get_ydata() == pytest.approx(
        [statistics.fmean(value_of("tcl", seed, step, "negatives") for seed in range(3)) for step in (10, 20)]
    )
