"""The fault injector injects what its text form says, and the package has no code for it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_supcon
from hpc_supcon.distributed.watchdog import TRAINING, Phase, Watchdog, set_current_watchdog

from .injector import ACTIONS, PHASES, TIMEOUT_S, Fault, InjectedError, Injector, damage, inject, parse, system_calls


def test_the_text_form_names_every_part():
    assert parse("kill@rank=1,step=7,phase=save; enospc@phase=write,call=3;flip@phase=saved,file=state.json") == [
        Fault("kill", 1, 7, "save"),
        Fault("enospc", 0, None, "write", 3),
        Fault("flip", phase="saved", file="state.json"),
    ]
    assert parse("") == []
    for wrong in ("explode", "kill@phase=lunch", "kill@when=now"):
        with pytest.raises((ValueError, TypeError)):
            parse(wrong)


def test_a_fault_is_injected_only_at_its_rank_step_phase_and_call():
    faults = parse("raise@rank=1,step=3,phase=write,call=2")
    for rank, step, phase in ((0, 3, "write"), (1, 2, "write"), (1, 3, "fsync")):
        injector = Injector(faults, rank)
        for _ in range(4):
            injector.at(phase, step)
    injector = Injector(faults, 1)
    injector.at("write", 3)
    with pytest.raises(InjectedError):
        injector.at("write", 3)
    injector.at("write", 3)


@pytest.mark.parametrize(("action", "number"), [("usr2", signal.SIGUSR2), ("term", signal.SIGTERM)])
def test_a_signal_reaches_this_process(action, number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(action))
    try:
        inject(Fault(action), (), None)
    finally:
        signal.signal(number, before)
    assert seen == [action]


@pytest.mark.parametrize(("action", "number"), [("kill", 9), ("abort", 6), ("stop", 19)])
def test_a_process_is_killed_aborted_or_stopped(action, number):
    code = f"from tests.fault.injector import *; inject(Fault({action!r}), (), None)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if action == "stop":
        assert os.WIFSTOPPED(status)
        child.kill()
        _, status = os.waitpid(child.pid, 0)
        number = 9
    child.returncode = -os.WTERMSIG(status)  # waited for here, not by Popen
    assert os.WTERMSIG(status) == number


def test_the_timeout_of_training_steps_is_shortened():
    watchdog = Watchdog(step_timeout_s=600.0, first_step_timeout_s=600.0)
    previous = set_current_watchdog(watchdog)
    try:
        with watchdog.training():
            watchdog.completed(1)
            inject(Fault("timeout"), (), None)
            watchdog.completed(2)
            assert watchdog.current_phase == Phase(TRAINING, TIMEOUT_S)
            assert watchdog.step_timeout_s == TIMEOUT_S
    finally:
        set_current_watchdog(previous)


@pytest.mark.parametrize("action", ["enospc", "edquot", "erofs", "eacces", "eio"])
def test_a_disk_error_is_raised_by_the_system_call(tmp_path, action):
    injector = Injector(parse(f"{action}@phase=mkdir"), 0)
    injector.around_save(lambda folder, step: folder)(tmp_path, 1)
    (tmp_path / "outside a save").mkdir()

    def save(folder, step):
        (folder / "inside").mkdir()

    with (
        system_calls(injector.before_call),
        pytest.raises(OSError, match=rf"\[Errno {getattr(errno, action.upper())}\]"),
    ):
        injector.around_save(save)(tmp_path, 1)


def test_a_file_is_truncated_or_one_of_its_bits_flipped(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    damage(path, "flip")
    assert path.read_bytes() == b"\0\0\0\0\0\1\0\0\0\0"
    damage(path, "truncate")
    assert path.read_bytes() == bytes(5)


def test_the_package_has_no_code_for_faults():
    for path in Path(hpc_supcon.__file__).parent.rglob("*.py"):
        assert "HPC_SUPCON_FAULT" not in path.read_text()
    assert {"kill", "stop", "abort", "raise", "truncate", "flip"} < set(ACTIONS)
    assert {"step", "save", "saved"} < set(PHASES)
