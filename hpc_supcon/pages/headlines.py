"""The results on the first screen of a page: the test accuracy of each probe, or of the best groups of runs."""

from __future__ import annotations

from typing import Any

from ..errors import printable
from .compare import Comparison, mean_text
from .formats import shown
from .page import Headline
from .read import Run, interval_of, mapping, number, numbers
from .scores import split_scores
from .statistics import fraction_interval

MAX_HEADLINES = 6


def headlines_of_run(run: Run) -> list[Headline]:
    """The test accuracy of each probe, with its interval; where there is none, how far training is."""
    found = []
    for (kind, split), scores in split_scores(run).items():
        accuracy = number(scores.get("accuracy"))
        if split != "test" or accuracy is None:
            continue
        interval, samples = interval_of(scores.get("accuracy_interval")), _test_samples(run, kind, scores)
        if interval is None and samples and 0 <= accuracy <= 1:
            interval = fraction_interval(accuracy, samples)
        where = f"{samples:,} test images" if samples else "test images"
        found.append(_headline(f"{kind} probe", accuracy, interval, where))
    if not found:
        last = next((e for e in reversed(run.events) if e["event"] == "train"), {})
        loss = number(last.get("loss"))
        value = "no results yet" if loss is None else f"loss {shown(loss)}"
        found = [Headline(run.state, value, f"step {last['step']:,}" if last else "")]
    return found[:MAX_HEADLINES]


def _headline(label: str, accuracy: float, interval: tuple[float, float] | None, where: str) -> Headline:
    detail = f"95 % interval {100 * interval[0]:.1f} – {100 * interval[1]:.1f} %, {where}" if interval else where
    return Headline(printable(f"{label}, test accuracy"), f"{100 * accuracy:.1f} %", detail, accuracy, interval)


def headlines_of_groups(comparison: Comparison) -> list[Headline]:
    """The best groups by their test accuracy, in the first section that has one."""
    section = next(
        (s for s, scores in comparison.sections.items() if s.endswith(", test") and "accuracy" in scores), ""
    )
    found = []
    for group in comparison.groups:
        mean = group.interval(section, "accuracy")
        if mean is not None:
            interval = (mean[0] - mean[1], mean[0] + mean[1]) if mean[1] else None
            n = len(group.values[section, "accuracy"])
            probe, seeds = section.rpartition(", ")[0], f"{n} seed{'s' if n > 1 else ''}"
            detail = f"test accuracy {mean_text(group, section, 'accuracy')}, {probe} probe, {seeds}"
            found.append(Headline(group.label, f"{100 * mean[0]:.1f} %", detail, mean[0], interval))
    best = sorted(found, key=lambda headline: -(headline.fraction or 0.0))[:MAX_HEADLINES]
    return best or [Headline("runs", "no results yet")]


def _test_samples(run: Run, kind: str, scores: dict[str, Any]) -> int | None:
    told = number(scores.get("samples"))
    if told is not None:
        return int(told)
    if "@" in kind:  # of other data
        return None
    split = mapping(mapping(mapping(run.checkpoint.get("data")).get("splits")).get("test"))
    counts = [n for n in numbers(split.get("counts")) if n is not None]
    return int(sum(counts)) or None
