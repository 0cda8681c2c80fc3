"""Asked to leave by a signal: all ranks save at the same step, leave with code 75, and no step is lost."""

from __future__ import annotations

import json
import signal

import pytest

from hpc_supcon.training import checkpoint, preempt

from .test_faults import SAVED, hashes, newest, start, whole  # noqa: F401 (fixture)

LEFT = preempt.EXIT_CODE


def events(folder, name):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (1, "usr2@step=9"),
        (2, "term@rank=1,step=9"),
        (2, "usr2@rank=0,step=9;usr2@rank=1,step=9"),
        (3, "usr2@rank=2,step=9;term@rank=0,step=10"),
    ],
)
def test_a_signal_to_any_rank_loses_no_step(tmp_path, whole, ranks, fault):
    settings = [] if ranks < 3 else ["data.batch_size=18"]
    code, said = start(ranks, tmp_path / "r", *settings, fault=fault)
    assert code == LEFT, said
