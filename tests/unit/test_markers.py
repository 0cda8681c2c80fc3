"""Markers of tests: what `pytest -m cuda` runs."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_only_a_gpu_can_run_carries_the_marker():
    by_hand = "not torch.cuda.is_available()"
    here = {TESTS / "devices.py", Path(__file__)}
    found = [path for path in TESTS.rglob("*.py") if path not in here and by_hand in path.read_text()]
    assert not found, "decorate the test with tests.devices.needs_cuda, which skips it and marks it"
