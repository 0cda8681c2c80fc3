"""Tables as Markdown, LaTeX and CSV. Text in them is a user's, and is never read as markup or as a formula."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from ..errors import printable

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": r"$-$", "\n": " ",
}  # fmt: skip


def tex(text: str) -> str:
    """The text for LaTeX, with its special characters escaped."""
    return "".join(_TEX.get(character, character) for character in text)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""

    def line(cells: Sequence[str]) -> str:
        safe = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return "| " + " | ".join(" ".join(cell.splitlines()) for cell in safe) + " |\n"

    return line(headings) + "|" + "---|" + "---:|" * (len(headings) - 1) + "\n" + "".join(map(line, rows))


def latex_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], above: Sequence[str] = ()) -> str:
    """A `table` for the booktabs package. above: lines of LaTeX above the headings."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}", r"\toprule", *above]
    lines += [" & ".join(map(tex, headings)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def csv_text(headings: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Numbers in full precision. A text that a spreadsheet would take for a formula begins with an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_inert(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return buffer.getvalue()


def _inert(text: str) -> str:
    text = printable(text)  # a tab or a carriage return would begin a formula too
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def shown(value: float, digits: int = 4) -> str:
    """A number for a table: fixed digits where it is of the size of a fraction, else four significant ones."""
    if value == 0 or 0.001 <= abs(value) < 100:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
