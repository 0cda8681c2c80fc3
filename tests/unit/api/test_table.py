"""Rows that are a list for a program and a table for a reader."""

from __future__ import annotations

import pytest

import hpc_supcon as hs

ROWS = [{"step": 1, "loss": 2.5, "name": "<b>"}, {"step": 2, "accuracy": 0.5, "test": {"f1": 0.25, "n": [1, 2]}}]


def test_a_table_is_a_list_of_its_rows():
    table = hs.Table(ROWS)
    assert table == ROWS
    assert table.columns == ["step", "loss", "name", "accuracy", "test"]
    assert table.column("step") == [1, 2]
    assert table.column("loss") == [2.5]
    assert table.where(step=2) == ROWS[1:]
    assert table.where(loss=None, step=2) == ROWS[1:]
    assert repr(table) == "Table of 2 rows: step, loss, name, accuracy, test"
    with pytest.raises(KeyError, match="no column 'losses'; there are step, loss"):
        table.column("losses")


def test_a_notebook_shows_it_escaped_flat_and_cut():
    shown = hs.Table(ROWS)._repr_html_()
    assert "<th>test.f1</th>" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    many = hs.Table({"i": i} for i in range(1000))._repr_html_()
    assert many.count("<tr>") == 1 + 21
    assert "<td>999</td>" in many
    assert "1000 rows" in many
    assert "0 rows" in hs.Table()._repr_html_()


def test_arrow_has_nulls_where_a_row_has_no_value():
    pytest.importorskip("pyarrow")
    table = hs.Table(ROWS).to_arrow()
    assert table.column("test.f1").to_pylist() == [None, 0.25]
    assert table.column("test.n").to_pylist() == [None, [1, 2]]
    assert hs.Table().to_arrow().num_rows == 0
