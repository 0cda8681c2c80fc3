"""The results of probes as tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..run_folder import read_scores
from ..terminal import output


def print_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """A row for each probe and split."""
    caption = "[ ]: 95 % interval over images"
    if any(result["probe"] == "knn" for result in results):
        caption += "; train of knn: leave-one-out"
    table = Table(title=_title(results), caption=caption, caption_justify="left")
    names = ("f1", "precision", "recall")
    for heading in ("probe", "split", "accuracy", *names):
        table.add_column(heading, justify="right" if heading in names else "left", no_wrap=True)
    scores = read_scores(folder).get("probes", {})
    for result in results:
        for split in ("train", "validation", "test"):
            if result[split] is not None:
                accuracy = _accuracy(result[split], scores.get(result["probe"], {}).get("splits", {}).get(split, {}))
                numbers = (f"{result[split][name]:.4f}" for name in names)
                table.add_row(result["probe"], split, accuracy, *numbers, end_section=split == "test")
    console = output()
    console.print(table)
    if corrupted := {result["probe"]: result["corruptions"] for result in results if "corruptions" in result}:
        console.print(_corruption_table(corrupted))
    console.print(f"results: {folder / 'results.json'}", soft_wrap=True)


def _corruption_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """A row for each probe: test errors on clean and on corrupted images."""
    images = max(summary["images"] for summary in summaries.values())
    table = Table(title=f"errors on {images:,} corrupted test images")
    for heading in ("probe", "clean", "mean", "worst corruption"):
        table.add_column(heading, justify="right" if heading in ("clean", "mean") else "left")
    for kind, found in summaries.items():
        numbers = (f"{found[name]:.4f}" for name in ("clean", "mce"))
        table.add_row(kind, *numbers, f"{found['worst']}: {found['worst_error']:.4f}")
    return table


def _accuracy(result: dict[str, Any], scores: dict[str, Any]) -> str:
    """`0.9889 [0.974, 0.997]`; without the interval where `scores` are those of an earlier evaluation, because these
    could not be written."""
    text = f"{result['accuracy']:.4f}"
    if scores.get("accuracy") != result["accuracy"]:
        return text
    low, high = scores["accuracy_interval"]
    return f"{text} [{low:.3f}, {high:.3f}]"


def _title(results: list[dict[str, Any]]) -> str:
    """The encoder that was probed, or the data where all probes read pixels."""
    for result in results:
        if result["encoder"] is not None:
            return f"{result['encoder']}, {result['loss']} ({result['checkpoint']})"
    return f"{results[0]['data']}, pixels"
