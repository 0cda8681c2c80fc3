"""The page of one run folder or of several."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import printable
from .blobs import Blobs
from .compare import Comparison, compare
from .curves import breakdown_of, cost_of, curves_data
from .formats import duration
from .headlines import headlines_of_groups, headlines_of_run
from .maps import FOLDER, NO_LABELS, maps_data, thumbnails_data
from .page import Page, Section
from .pruning import pruning_table
from .read import Run, mapping, number, numbers, read_runs, texts
from .scores import split_scores
from .tables import (
    Table,
    comparison_tables,
    corruption_table,
    facts_tables,
    hours,
    per_class_tables,
    phases_table,
    results_table,
    section_tables,
    settings_table,
)

PAGE = "report.html"
MAX_PICTURE = 400_000
"""Bytes of a PNG that goes into a page as it is; a larger one is compressed."""


def page_of_runs(folders: Sequence[Path]) -> Page:
    """Read the folders and build their page. Raises RunFolderError for a folder that is not one of a run."""
    runs = read_runs(folders)
    comparison = compare(runs)
    data = data_of(runs)
    facts = [facts_of(run) for run in runs]
    sections = result_sections(runs, comparison, data) + record_sections(runs, facts)
    notices = [*comparison.notices, *(_unfinished(run) for run in runs), *(n for run in runs for n in run.notices)]
    one = runs[0] if len(runs) == 1 else None
    return Page(
        title=runs[0].name if one else f"{len(runs)} runs",
        kind="Run" if one else "Comparison",
        summary=_summary(one) if one else _summary_of_several(runs),
        headlines=headlines_of_run(one) if one else headlines_of_groups(comparison),
        facts=[(k, v) for k, v in facts[0].items() if k in FIRST_FACTS] if one else [],
        sections=[section for section in sections if section.tables or section.widget or section.picture],
        notices=[notice for notice in dict.fromkeys(notices) if notice],
        data=data,
        has_map=any(run["maps"] for run in data["runs"]),
    )


def data_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script of the page draws."""
    blobs = Blobs()
    found: list[dict[str, Any]] = [{"label": run.label, "maps": maps_data(run, blobs)} for run in runs]
    for run, entry in zip(runs, found, strict=True):  # what matters more has been given its room
        entry["thumbnails"] = thumbnails_data(run, blobs) if entry["maps"] else None
    confusions = [one for i, run in enumerate(runs) for one in _confusions(run, i)]
    return {"runs": found, "curves": curves_data(runs), "confusions": confusions, "blobs": blobs.texts}


def result_sections(runs: Sequence[Run], comparison: Comparison, data: dict[str, Any]) -> list[Section]:
    several = len(runs) > 1
    tables = [table for table in (results_table(runs),) if table]
    embedding = section_tables(runs, "embedding", "Quality of the embedding", "space")
    ood = section_tables(runs, "out of distribution", "Images of other data sets", "data set, detector")
    robust = [table for run in runs for table in _named(corruption_table(run), run, several)]
    classes = [table for run in runs for table in _named(per_class_tables(run), run, several)]
    neighbors = [
        _picture(run, f"{FOLDER}/neighbors.png", "Test images of {} with the nearest images in the embedding")
        for run in runs
    ]
    pruned = pruning_table(runs)
    pruning = [
        _picture(run, "plots/pruning.png", "Accuracy of {} against the share of pruned weights") for run in runs
    ]
    return [
        Section("comparison", "Comparison", comparison_tables(comparison) if several else []),
        Section("results", "Results", tables),
        Section("pruned", "Pruning", [pruned] if pruned else []),
        *_pictures("pruning", "Accuracy against sparsity", runs, pruning),
        Section("curves", "Curves", widget="curves" if data["curves"]["series"] else ""),
        Section("confusion", "Confusions", classes, widget="confusion" if data["confusions"] else "", closed=True),
        Section("embedding", "Embedding", [embedding] if embedding else []),
        Section("robustness", "Robustness", [*robust, *([ood] if ood else [])]),
        *_pictures("neighbors", "Nearest neighbors", runs, neighbors),
    ]


def _pictures(
    id: str, title: str, runs: Sequence[Run], pictures: Sequence[tuple[str, str] | None]
) -> Iterator[Section]:
    for i, (run, picture) in enumerate(zip(runs, pictures, strict=True)):
        if picture:
            yield Section(f"{id}-{i}", title + (f", {run.label}" if len(runs) > 1 else ""), picture=picture)


def record_sections(runs: Sequence[Run], facts: Sequence[dict[str, str]]) -> list[Section]:
    settings = settings_table(runs)
    phases = [table for run in runs if (table := phases_table(run, breakdown_of(run)))]
    record = facts_tables("Machine, versions and cost", facts, runs)
    return [
        Section("record", "How it was run", [*record, *phases]),
        Section("settings", "Configuration", [settings] if settings else []),
    ]


def _named(tables: list[Table], run: Run, several: bool) -> list[Table]:
    for table in tables:
        table.title += f", {run.label}" if several else ""
    return tables


FIRST_FACTS = ("state", "data", "images for training", "parameters", "device", "ranks", "training time", "started")


def facts_of(run: Run) -> dict[str, str]:
    """Everything that is recorded of how a run was made, as text."""
    start, cost = run.start, cost_of(run)
    ranks = number(start.get("world_size")) or 1.0
    found: dict[str, Any] = {
        "state": run.state,
        "data": run.data + (f" ({NO_LABELS})" if run.is_unlabeled else ""),
        "encoder": run.config.get("model.encoder"),
        "loss": run.loss,
        "seed": run.seed,
        "images for training": _count(start.get("train_images")),
        "parameters": _count(start.get("parameters")),
        "command": start.get("command"),
        "run folder": run.folder,
        "machine": start.get("host"),
        "device": start.get("device"),
        "ranks": start.get("world_size"),
        "threads of a rank": start.get("threads"),
        "engine": start.get("engine"),
        "loader": start.get("loader"),
        "hpc-supcon": start.get("version"),
        "commit": start.get("commit"),
        "PyTorch": start.get("torch"),
        "Python": start.get("python"),
        "started": _date(start.get("time")),
    }
    if cost:
        device = str(start.get("device") or "")
        unit = "time on all ranks" if not device else "CPU time" if device == "cpu" else "GPU time"
        cores = (number(start.get("threads")) or 1.0) if device == "cpu" else 1.0
        found["training time"] = duration(cost["seconds"])
        found[unit] = hours(cost["seconds"], ranks * cores)
        found["waiting for data"] = f"{cost['data_wait']:.1%}" if "data_wait" in cost else None
        found["processes that trained"] = f"{cost['processes']:.0f}" if cost["processes"] > 1 else None
    probes = sum(number(result.get("seconds")) or 0.0 for result in run.results)
    found["time of the probes"] = duration(probes) if probes else None
    return {name: printable(value) for name, value in found.items() if value not in (None, "")}


def _count(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.0f}"


def _date(value: Any) -> str:
    found = number(value)
    try:
        return "" if found is None else datetime.fromtimestamp(found, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def _summary(run: Run) -> str:
    data = run.data + (f" ({NO_LABELS})" if run.is_unlabeled else "")
    parts = [run.config.get("model.encoder"), run.loss, data, f"seed {run.seed}" if "seed" in run.config else ""]
    return printable(" · ".join(str(part) for part in parts if part))


def _summary_of_several(runs: Sequence[Run]) -> str:
    shared = []
    for key in ("model.encoder", "loss.name", "data.source"):
        values = list(dict.fromkeys(str(run.config.get(key, "")) for run in runs))
        shared.append(values[0] if len(values) == 1 else f"{len(values)} values of {key}")
    return printable(" · ".join(shared))


def _unfinished(run: Run) -> str:
    if split_scores(run):
        return ""
    if run.is_unlabeled and run.state == "finished":
        return (
            f"{run.label}: {NO_LABELS}, so no probes: probe.transfer, or data.source=... of probe, names labeled data"
        )
    at = next((f", at step {event['step']}" for event in reversed(run.events) if event["event"] == "train"), "")
    return f"{run.label}: no results yet ({run.state}{at})"


def _confusions(run: Run, of: int) -> list[dict[str, Any]]:
    """For the script: the counts that are not zero, as [row, column, count, row, ...]; the test split first."""
    found = []
    for kind, entry in mapping(run.scores.get("probes")).items():
        for split, scores in mapping(mapping(entry).get("splits")).items():
            given = mapping(scores).get("confusion")
            if given is None:
                continue
            rows = [numbers(row) for row in given] if isinstance(given, list) else []
            if not rows or any(len(row) != len(rows) or None in row for row in rows):
                run.notices.append(
                    f"{run.folder}: the confusion matrix of {kind}, {split} is not a square of numbers"
                )
                continue
            classes = texts(mapping(entry).get("classes"))
            classes = classes if len(classes) == len(rows) else [str(i) for i in range(len(rows))]
            counts = [x for i, row in enumerate(rows) for j, n in enumerate(row) if n for x in (i, j, n)]
            found.append({"run": of, "probe": kind, "split": split, "classes": classes, "counts": counts})
    return sorted(found, key=lambda one: one["split"] != "test")


def _picture(run: Run, name: str, about: str) -> tuple[str, str] | None:
    """A PNG of the run folder as a data URI, compressed where it is large, and its description."""
    path = run.folder / name
    try:
        payload, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(payload), formats=["PNG"]) as picture:
            if len(payload) > MAX_PICTURE:
                buffer, kind = io.BytesIO(), "webp"
                picture.convert("RGB").save(buffer, "WEBP", quality=80)
                payload = buffer.getvalue()
            else:
                picture.verify()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        run.notices.append(f"{path}: cannot be shown: {error}")
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(payload).decode('ascii')}"
    return uri, about.format(run.label)
