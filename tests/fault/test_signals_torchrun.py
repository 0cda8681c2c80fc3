"""Signals under a real torchrun: all ranks save at the same step, and torchrun reports their exit code."""

from __future__ import annotations

import os
import signal

from .runs import STEPS_PER_EPOCH, newest, steps
from .torchrun import Torchrun

LONG = ("train.epochs=400", "log.every_steps=1", "checkpoint.every_steps=40")


def check_saved_together(it, folder):
    assert it.end() == 1, "torchrun's own code; the worker's is in its report"
    it.wait_until_none_survives()
    saved = newest(folder)
    assert steps(folder) == list(range(1, saved + 1)), "every step that was made is in the checkpoint"
    assert saved < 400 * STEPS_PER_EPOCH
    assert f"saved at step {saved}; start again with --resume" in it.stderr


def test_sigusr2_to_one_worker_makes_both_save_and_exit(tmp_path):
    it = Torchrun(2, tmp_path / "r", *LONG)
    it.wait_for_a_checkpoint()
    os.kill(it.workers()[1], signal.SIGUSR2)
    check_saved_together(it, tmp_path / "r")
    assert "exitcode  : 75" in it.stderr


def test_sigterm_to_torchrun_reaches_the_workers_which_save_and_exit(tmp_path):
    """torchrun passes SIGTERM on and waits 30 s before it kills."""
    it = Torchrun(2, tmp_path / "r", *LONG)
    it.wait_for_a_checkpoint()
    it.process.send_signal(signal.SIGTERM)
    check_saved_together(it, tmp_path / "r")
