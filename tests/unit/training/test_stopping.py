"""Early stopping: patience, minimum change and target, as they are defined."""

from __future__ import annotations

import json

import pytest

from hpc_supcon.training.plan import EarlyStopping


def stopped_after(stopping: EarlyStopping, values: list[float]) -> int | None:
    for i, value in enumerate(values):
        stopping.update(value, i)
        if stopping.stop:
            return i
    return None


@pytest.mark.parametrize(
    ("monitor", "options", "values", "stop", "best_at"),
    [
        ("loss", {"patience": 2}, [3, 2, 2.5, 2.1, 1], 3, 1),
        ("accuracy", {"patience": 2}, [0.3, 0.5, 0.4, 0.6, 0.5, 0.6], 5, 3),
        ("loss", {"patience": 1}, [1, 1], 1, 0),  # equal is no improvement
        ("loss", {"patience": 2, "min_change": 0.1}, [1, 0.95, 0.91, 0.5], 2, 0),
        ("loss", {"patience": 3, "min_change": 0.1}, [1, 0.95, 0.89, 0.88, 0.87, 0.86], 5, 2),
        ("accuracy", {"target": 0.9}, [0.5, 0.9, 0.95], 1, 1),
        ("loss", {"target": 0.2}, [0.5, 0.21, 0.2], 2, 2),
        ("loss", {}, [1, 2, 3, 4, 5], None, 0),
        ("loss", {"patience": 2}, [float("nan"), float("nan")], 1, None),
        ("loss", {"patience": 2}, [1, float("nan"), 0.5, float("nan")], None, 2),
        ("loss", {"patience": 0}, [3, 2, 1, 1.5, 0.5], 3, 2),
        ("accuracy", {"patience": 0}, [0.5, 0.5], 1, 0),
        ("accuracy", {"patience": 0}, [0.5, 0.6, 0.7], None, 2),
    ],
)
def test_stops_where_patience_or_target_say(monitor, options, values, stop, best_at):
    stopping = EarlyStopping(monitor, **options)
    assert stopped_after(stopping, values) == stop
    assert stopping.best_at == best_at


@pytest.mark.parametrize(
    ("patience", "values", "stop"),
    [
        # evaluated every 10 iterations; the assignment's linear classifier, patience 300, stopped at 2900
        (300, [1 / (1 + i) for i in range(260)] + [2.0] * 60, 2890),
        (25, [3, 2, 2.5, 2.6, 2.7, 1], 40),
        (30, [3, 2, 2.5, 2.6, 2.7, 1], 40),
        (31, [3, 2, 2.5, 2.6, 2.7, 1], None),
        (20, [float("nan")] * 4, 20),
        (0, [3, 2, 2.5], 20),
    ],
)
def test_patience_in_iterations_counts_from_the_best_evaluation(patience, values, stop):
    stopping = EarlyStopping("loss", patience=patience, patience_unit="iterations")
    for i, value in enumerate(values):
        stopping.update(value, 10 * i)
        if stopping.stop:
            break
    assert (10 * i if stopping.stop else None) == stop


@pytest.mark.parametrize("unit", ["evaluations", "iterations"])
@pytest.mark.parametrize("cut", range(6))
def test_a_restored_state_decides_as_the_uninterrupted_one(cut, unit):
    values = [0.1, 0.3, 0.3, 0.2, 0.31, 0.1, 0.1]
    first = EarlyStopping("accuracy", patience=3, patience_unit=unit, min_change=0.05)
    stopped_after(first, values[:cut])
    second = EarlyStopping("accuracy", patience=3, patience_unit=unit, min_change=0.05)
    second.load_state(json.loads(json.dumps(first.state())))
    whole = EarlyStopping("accuracy", patience=3, patience_unit=unit, min_change=0.05)
    for i, value in enumerate(values):
        whole.update(value, i)
        if i >= cut:
            second.update(value, i)
    assert second.state() == whole.state()
    assert second.stop == whole.stop
