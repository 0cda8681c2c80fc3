"""A run folder that is deleted or moved while the run trains."""

from __future__ import annotations

import time

from ..processes import RUN_TIMEOUT_S
from .runs import Run


def test_all_ranks_stop_at_the_next_save_naming_the_folder_and_make_no_new_one(tmp_path):
    folder = tmp_path / "a run"
    it = Run(2, folder, "train.epochs=2000")
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, it.stderr
        time.sleep(0.1)
    folder.rename(tmp_path / "elsewhere")
    assert it.end() == [2, 2]
    assert f"{folder}: was deleted or moved while the run trained" in it.stderr
    assert not folder.exists()
