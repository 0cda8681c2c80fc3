"""Text of a user's in CSV, LaTeX and Markdown stays text."""

from __future__ import annotations

import csv
import io

import pytest

from hpc_supcon.pages.formats import csv_text, duration, latex_table, markdown_table, shown


@pytest.mark.parametrize("formula", ["=1+1", "+1+1", "-1-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x")', "-"])
def test_no_cell_of_a_csv_begins_a_formula(formula):
    ((cell,),) = csv.reader(io.StringIO(csv_text(["h"], [[formula]]).partition("\n")[2]))
    assert cell in (f"'{formula}", formula.encode("unicode_escape").decode())
    assert cell[0] not in "=+-@\t\r"


@pytest.mark.parametrize("number", ["-0.5", "+3", "1e-3", "tcl", "a=b", ""])
def test_numbers_and_other_text_of_a_csv_are_as_they_are(number):
    assert list(csv.reader(io.StringIO(csv_text(["h", "i"], [[number, -0.25]]))))[1] == [number, "-0.25"]


def test_latex_escapes_every_special_character():
    text = latex_table(r"50 % of a_b & {c} \ ~ ^ $ #", ["a_b", "±"], [["<x>", "−0.1 ± 0.2"]])
    assert r"50 \% of a\_b \& \{c\} \textbackslash{} \textasciitilde{} \textasciicircum{} \$ \#" in text
    assert r"\textless{}x\textgreater{} & $-$0.1 $\pm$ 0.2 \\" in text
    assert text.count(r"\begin") == text.count(r"\end") == 2


def test_markdown_escapes_bars_newlines_and_tags():
    lines = markdown_table(["a|b\nc", "n"], [["<script>", "\\|"]]).splitlines()
    assert lines == ["| a\\|b c | n |", "|---|---:|", "| &lt;script> | \\\\\\| |"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (12.2, "12 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (90000, "25 h 0 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5000"), (0.0, "0.0000"), (1e-5, "1e-05"), (134176.0, "134,176"), (-123.456, "-123.5")],
)
def test_numbers_of_tables(value, text):
    assert shown(value) == text
