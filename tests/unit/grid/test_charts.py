"""Claims about charts that a glance would settle, settled without one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hpc_supcon.grid.cells import load
from hpc_supcon.grid.charts import chart
from hpc_supcon.grid.expand import expand
from hpc_supcon.grid.tables import TableData

GRIDS = Path(__file__).parents[3] / "launch/grids"


def _curves():
    for path in sorted(GRIDS.glob("*.yaml")):
        for table in load(path)[0].tables:
            if table.layout in ("curve", "pruning"):
                yield pytest.param(path, table.rows, id=f"{path.stem}-{table.rows}")


@pytest.mark.parametrize(("path", "axis"), list(_curves()))
def test_the_ticks_of_a_ready_grids_curve_can_be_read(path, axis):
    rows = list(dict.fromkeys(str(cell.labels[axis]) for cell in expand(load(path)).cells))
    rows = [row if row != "null" else "0" for row in rows]
    columns = ["supcon", "tcl"]
    values = {(row, column, "accuracy"): [0.5] for row in rows for column in columns}
    values |= {(row, column, "sparse_mb"): [1.38] for row in rows for column in columns if "prune" in axis}
    figure = chart(TableData("a title", "curve", axis, rows, columns, ("accuracy",), values))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text().splitlines()[0] for label in labels] == rows
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    for (a, b), (left, right) in zip(itertools.combinations(boxes, 2), itertools.combinations(rows, 2), strict=True):
        assert not a.padded(2).overlaps(b.padded(2)), f"{left} and {right} touch"
