"""How monitors measure time."""

from __future__ import annotations

from hpc_supcon.distributed import monitors


def test_time_in_which_the_process_is_suspended_does_not_count(monkeypatch):
    now = 100.0
    monkeypatch.setattr(monitors.time, "monotonic", lambda: now)
    clock = monitors._Clock()
    unchanged = monitors._Unchanged(clock)
    assert unchanged.seconds(5) == 0
    for later in (101.0, 102.0, 5000.0, 5001.0):
        now = later
        clock.tick()
    assert unchanged.seconds(5) == 1 + 1 + 2 + 1
    assert unchanged.seconds(6) == 0
