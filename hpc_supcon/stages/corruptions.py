"""A part of stage `probe`: writes the probes' errors on corrupted test images, and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import run_folder
from ..evaluation.plots import draw_corruptions
from ..evaluation.probes import FittedProbe, ProbeTask
from ..evaluation.robustness import corruption_errors, worst
from ..terminal import only_told
from .results import ResultWriter

SECTION = "corruptions"


def add_corruptions(
    folder: Path,
    tasks: Sequence[ProbeTask],
    probes: Sequence[FittedProbe],
    results: Sequence[dict[str, Any]],
    writer: ResultWriter,
) -> None:
    """Evaluate the probes on `probe.corruptions`, if any. Collective.

    Errors go into scores.json and plots/corruptions.png, a summary "corruptions" into each of `results`, which are
    written again.

    Raises as `corruption_errors`; failures to write are told by the writer.
    """
    if not tasks[0].config.probe.corruption_names:
        return
    found = corruption_errors(tasks, probes)
    for result in results:
        if (scores := found.get(result["probe"])) is None:
            continue
        name, error = worst(scores)
        summary = {key: value for key, value in scores.items() if key != "errors"}
        result[SECTION] = {**summary, "worst": name, "worst_error": error}
        if tasks[0].runtime.is_main:
            _write(folder, result, scores, writer)
    if tasks[0].runtime.is_main and found:
        with only_told():
            draw_corruptions(folder, found)


def _write(folder: Path, result: dict[str, Any], scores: dict[str, Any], writer: ResultWriter) -> None:
    writer.add(folder, result)
    with writer.may_fail():
        run_folder.add_scores(folder, SECTION, result["probe"], {"checkpoint": result["checkpoint"], **scores})
