"""Curves of runs from metrics.jsonl: each number over step, epoch, time and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metric_file import Event
from .read import Run, mapping, number

MAX_POINTS, MOST_POINTS, FEWEST_POINTS = 100_000, 2000, 40
"""Points of all curves of a page, and of one: of more, every n-th is taken."""
_NOT_DRAWN = ("event", "step", "time", "epoch", "time_left_s")
_FIRST = ("loss", "accuracy", "lr", "grad_norm", "images_per_s")
_RESPONSES = ("response_positives", "response_negatives")
"""They are logged on request alone: where all runs have them, they are what is looked at first."""


def seconds_of(events: list[Event]) -> list[float]:
    """The time of each event since the start, in seconds, without the time in which no process trained."""
    elapsed, before, found = 0.0, None, []
    for event in events:
        at = number(event.get("time"))
        if at is not None:
            if before is not None and event["event"] != "start":
                elapsed += max(0.0, at - before)
            before = at
        found.append(elapsed)
    return found


def steps_per_epoch(run: Run) -> float | None:
    """As the run recorded; of older runs, whole batches in the images of an epoch."""
    recorded = number(run.start.get("steps_per_epoch"))
    images, batch = number(run.start.get("train_images")), number(run.config.get("data.batch_size"))
    return recorded or (max(1.0, images // batch) if images and batch else None)


def curves_data(runs: Sequence[Run]) -> dict[str, Any]:
    """For the page's script.

    series: by name of the number, such as "loss" or "linear probe: loss", a list of {run, split, x, y}; what is shown
    first is in front. x: the places that series share, {step, hours}; runs: for each run, the images of a step and
    the steps of an epoch, or null. Of a probe, which counts its own iterations, there are steps only.
    """
    found = {(name, i, split): points for i, run in enumerate(runs) for (name, split), points in _points(run).items()}
    most = max(FEWEST_POINTS, min(MOST_POINTS, MAX_POINTS // max(1, len(found))))
    places: dict[tuple[int, bool, tuple[int, ...]], int] = {}
    series: dict[str, list[dict[str, Any]]] = {}
    xs: list[dict[str, Any]] = []
    first: tuple[str, ...] = _FIRST
    if runs and all((_RESPONSES[0], i, "train") in found for i in range(len(runs))):
        first = _RESPONSES + _FIRST
    for (name, run, split), points in sorted(found.items(), key=lambda item: _order(item[0][0], first)):
        steps = _thinned(sorted(points), most)
        key = run, "probe: " in name, tuple(steps)
        if key not in places:
            places[key] = len(xs)
            hours = {} if key[1] else {"hours": [round(points[step][1] / 3600, 7) for step in steps]}
            xs.append({"step": steps, **hours})
        y = [float(f"{points[step][0]:.6g}") for step in steps]
        series.setdefault(name, []).append({"run": run, "split": split, "x": places[key], "y": y})
    scales = [{"batch": number(run.config.get("data.batch_size")), "epoch": steps_per_epoch(run)} for run in runs]
    return {"series": series, "x": xs, "runs": scales}


def _points(run: Run) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """(name, split) -> step -> (value, seconds). A step that is told twice counts as it was told last."""
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for event, seconds in zip(run.events, seconds_of(run.events), strict=True):
        for name, split, value in _numbers_of(event):
            found.setdefault((name, split), {})[event["step"]] = (value, seconds)
    return found


def _thinned(steps: list[int], most: int) -> list[int]:
    """At most about that many, the first and the last among them."""
    kept = steps[:: -(-len(steps) // most)]
    return kept if kept[-1] == steps[-1] else [*kept, steps[-1]]


def _numbers_of(event: Event) -> list[tuple[str, str, float]]:
    """(name, split, value) of each number in an event that is drawn."""
    kind, pairs = event["event"], []
    if kind not in ("train", "validation") and not kind.startswith("probe/"):
        return []
    for key, given in event.items():
        value = number(given)
        if key in _NOT_DRAWN or value is None:
            continue
        if kind.startswith("probe/"):
            split, name = "train", key
            for one in ("train", "validation"):
                if key.startswith(f"{one}_"):
                    split, name = one, key[len(one) + 1 :]
            pairs.append((f"{kind[6:]} probe: {name}", split, value))
        else:
            pairs.append((key, kind, value))
    return pairs


def _order(name: str, first: tuple[str, ...]) -> tuple[bool, int, str]:
    return ": " in name, first.index(name) if name in first else len(first), name


def cost_of(run: Run) -> dict[str, float]:
    """seconds: of training; data_wait: the fraction of them in which it waited for data; processes: how many trained
    it. Steps that were trained again after a kill count once. Empty where nothing was trained."""
    starts = [event for event in run.events if event["event"] == "start"]
    trained = [(e, s) for e, s in zip(run.events, seconds_of(run.events), strict=True) if not _of_probe(e)]
    if not starts or not trained:
        return {}
    cost = {"seconds": trained[-1][1], "processes": float(len(starts))}
    weights, waited, before = 0.0, 0.0, 0.0
    for event in (event for event, _ in trained if event["event"] == "train"):
        wait, rate = number(event.get("data_wait")), number(event.get("images_per_s"))
        if wait is not None and rate:
            seconds = max(0.0, event["step"] - before) / rate
            weights, waited = weights + seconds, waited + wait * seconds
        before = event["step"]
    return cost | ({"data_wait": waited / weights} if weights else {})


def _of_probe(event: Event) -> bool:
    return event["event"] == "probe" or event["event"].startswith("probe/")


def breakdown_of(run: Run) -> Event:
    """The last event "profile" of a run: see training/profile.py. {} where none was asked for."""
    return mapping(next((event for event in reversed(run.events) if event["event"] == "profile"), {}))
