"""Runs beside each other: those that differ only in their seed are a group, with mean, interval and differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import is_neutral
from ..errors import printable
from .formats import csv_text, latex_table, markdown_table, shown
from .read import Run, settings_that_differ
from .scores import name_of, ordered, sections_of
from .statistics import mean_and_interval, paired_difference

_OF_RESULTS = ("probe.", "prune.")
"""Neutral for pre-training, not for the scores."""
_LONGEST_LABEL = 70


@dataclass
class Group:
    """Runs that differ only in their seed. values[section, score][seed]; of two runs of one seed, the mean counts."""

    label: str
    runs: list[Run]
    values: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def interval(self, section: str, score: str) -> tuple[float, float] | None:
        return mean_and_interval(list(self.values.get((section, score), {}).values()))


@dataclass
class Comparison:
    """sections: section -> its scores, in the order of the tables. The first group is what others are compared to."""

    groups: list[Group]
    sections: dict[str, list[str]]
    notices: list[str]

    def difference(self, group: Group, section: str, score: str) -> tuple[float, float, int] | None:
        """(mean of group - first, half width of its 95 % interval, pairs), over the seeds that both have."""
        first = self.groups[0]
        # the test images of a probe of other data are those that its name tells, whatever the run was trained on
        if group is first or not ("@" in section or _same_test_set(first.runs[0], group.runs[0])):
            return None
        return paired_difference(first.values.get((section, score), {}), group.values.get((section, score), {}))


def compare(runs: Sequence[Run]) -> Comparison:
    """Groups in the order in which their first run was given."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(_identity(run), []).append(run)
    members = list(by_config.values())
    groups = [Group(label, own) for label, own in zip(_labels(members), members, strict=True)]
    names: dict[str, set[str]] = {}
    for group in groups:
        collected: dict[tuple[str, str], dict[str, list[float]]] = {}
        for run in group.runs:
            for section, scores in sections_of(run).items():
                names.setdefault(section, set()).update(scores)
                for score, value in scores.items():
                    collected.setdefault((section, score), {}).setdefault(str(run.seed), []).append(value)
        group.values = {
            key: {seed: sum(values) / len(values) for seed, values in by_seed.items()}
            for key, by_seed in collected.items()
        }
    return Comparison(groups, {section: ordered(scores) for section, scores in names.items()}, _notices(groups))


def _identity(run: Run) -> str:
    return json.dumps({k: v for k, v in run.config.items() if _matters(k)}, sort_keys=True, default=str)


def _matters(key: str) -> bool:
    if key == "seed" or key.startswith("runtime."):
        return False
    return key.startswith(_OF_RESULTS) or not is_neutral(key)


def _labels(members: list[list[Run]]) -> list[str]:
    """What tells a group from the others: its settings, or the name of its first run where that is too long."""
    firsts = [runs[0] for runs in members]
    keys = [key for key in settings_that_differ(firsts) if _matters(key)]
    short = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    named = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    labels = [
        ", ".join(f"{n} {_text(run.config.get(k))}" for k, n in zip(keys, named, strict=True)) for run in firsts
    ]
    if len(firsts) == 1 or any(len(label) > _LONGEST_LABEL for label in labels):
        labels = [run.label for run in firsts]
    return [printable(label) for label in labels]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _same_test_set(a: Run, b: Run) -> bool:
    if a.data != b.data:
        return False
    return not (any(a.test_set) and any(b.test_set)) or a.test_set == b.test_set


def _notices(groups: list[Group]) -> list[str]:
    notices, first = [], groups[0].runs[0]
    sources = list(dict.fromkeys(run.data for group in groups for run in group.runs))
    if len(sources) > 1:
        notices.append(
            f"runs of different data sets ({', '.join(sources)}): their scores say nothing about each other, and no "
            "differences are given, but for probes of one other data set (PROBE@DATA)"
        )
    elif not all(_same_test_set(first, run) for group in groups for run in group.runs):
        notices.append("not all runs have the same test images: no differences are given between those")
    for group in groups:
        seeds = [str(run.seed) for run in group.runs]
        twice = [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
        if twice:
            notices.append(
                f"{group.label}: several runs of seed {', '.join(twice)}; the mean of each seed counts once"
            )
    return [printable(notice) for notice in notices]


def mean_text(group: Group, section: str, score: str) -> str:
    """`0.9731`, `0.9731 ± 0.0012`, with `(2)` where not all seeds of the group have it; "" without a value."""
    found = group.interval(section, score)
    if found is None:
        return ""
    n, seeds = len(group.values[section, score]), len({str(run.seed) for run in group.runs})
    text = shown(found[0]) + (f" ± {shown(found[1])}" if n > 1 else "")
    return text if n == seeds else f"{text} ({n})"


def difference_text(found: tuple[float, float, int] | None) -> str:
    """`+0.0012 ± 0.0008`; without an interval where there is one pair."""
    if found is None:
        return ""
    sign = "−" if found[0] < 0 else "+"
    return f"{sign}{shown(abs(found[0]))}" + (f" ± {shown(found[1])}" if found[2] > 1 else "")


def table_of(comparison: Comparison, section: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of one section: a row for each group, then one for each difference to the first."""
    scores = comparison.sections[section]
    rows = []
    for group in comparison.groups:
        seeds = ", ".join(dict.fromkeys(str(run.seed) for run in group.runs))
        rows.append([group.label, seeds, *(mean_text(group, section, score) for score in scores)])
    for group in comparison.groups[1:]:
        found = [comparison.difference(group, section, score) for score in scores]
        pairs = max((one[2] for one in found if one), default=0)
        if pairs:
            label = f"{group.label} − {comparison.groups[0].label}"
            rows.append([label, f"{pairs} pair{'s' if pairs > 1 else ''}", *map(difference_text, found)])
    return ["runs", "seeds", *map(name_of, scores)], rows


NOTE = (
    "Mean ± half width of the 95 % interval over seeds (Student's t). Differences are paired by seed, with the "
    "interval of the paired differences."
)


def as_markdown(comparison: Comparison) -> str:
    parts = [f"> {notice}\n" for notice in comparison.notices]
    parts += [f"## {section}\n\n{markdown_table(*table_of(comparison, section))}" for section in comparison.sections]
    return "\n".join([*parts, f"{NOTE}\n"])


def as_latex(comparison: Comparison) -> str:
    parts = [f"% {notice}\n" for notice in comparison.notices]
    parts += [latex_table(section, *table_of(comparison, section)) for section in comparison.sections]
    return "\n".join([f"% {NOTE}\n", *parts])


def as_csv(comparison: Comparison) -> str:
    """One line for each number."""
    headings = [
        "section", "score", "runs", "mean", "half_width", "n", "difference", "difference_half_width", "pairs",
    ]  # fmt: skip
    rows: list[list[str | float]] = []
    for section, scores in comparison.sections.items():
        for score in scores:
            for group in comparison.groups:
                found = group.interval(section, score)
                if found is not None:
                    n = len(group.values[section, score])
                    mean, half, pairs = comparison.difference(group, section, score) or ("", "", 0)
                    # one value has no interval
                    numbers = found[0], found[1] if n > 1 else "", n, mean, half if pairs > 1 else "", pairs
                    rows.append([section, score, group.label, *numbers])
    return csv_text(headings, rows)
