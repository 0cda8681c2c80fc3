"""The lock of a run folder: one process at a time, which another one can name, and which dies with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from hpc_supcon import run_lock as module
from hpc_supcon.errors import RunFolderError
from hpc_supcon.process import START_TIME, process_field
from hpc_supcon.run_lock import LOCK, Holder, release_all, run_lock

HOLD = """
import os, sys
from pathlib import Path
from hpc_supcon.run_lock import run_lock
with run_lock(Path(sys.argv[1]), print):
    if "orphan" in sys.argv and os.fork() == 0:
        sys.stdin.readline()  # outlives its parent
        sys.exit()
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(python, folder, *arguments):
    """Another process that holds the lock."""
    command = [python, "-c", HOLD, str(folder), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "ENDING_S", 0.0)
    monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.fixture
def without_locks(monkeypatch, impatient):
    """A file system without locks."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


def refused(folder):
    with pytest.raises(RunFolderError) as caught, run_lock(folder, print):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taken(folder):
    """The lines that are told while the lock is taken."""
    lines = []
    with run_lock(folder, lines.append):
        pass
    return lines


def this_process():
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, process_field(pid, START_TIME), module._machine(), "2026-01-01")


def left_by(folder, found):
    """A lock file that names this holder."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(found)))


def test_a_second_process_is_told_host_and_pid_of_the_first(tmp_path, python, impatient):
    with holder(python, tmp_path) as process:
        message = refused(tmp_path)
        assert message.startswith(f"{tmp_path}: in use by process {process.pid} on {socket.gethostname()} (since ")
        process.communicate("\n")
    assert taken(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over_although_its_child_lives_on(tmp_path, python, impatient):
    with holder(python, tmp_path, "orphan") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        (line,) = taken(tmp_path)
        assert f"taken over from process {process.pid} on {socket.gethostname()}" in line
    assert taken(tmp_path) == []


def test_one_process_may_ask_again_and_gives_it_up_at_the_end_of_the_outer_block(tmp_path, python, impatient):
    code = f"""
from pathlib import Path
from hpc_supcon import run_lock
run_lock.ENDING_S = 0.0
try:
    with run_lock.run_lock(Path({str(tmp_path)!r}), print):
        print("got it")
except run_lock.RunFolderError:
    print("refused")
"""

    def other():
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout

    with run_lock(tmp_path, print):
        with run_lock(tmp_path / "." / "", print):
            pass
        assert other() == "refused\n"
    assert other() == "got it\n"


def test_a_forked_process_does_not_hold_it(tmp_path, python):
    code = f"""
import os
from pathlib import Path
from hpc_supcon import run_lock
run_lock.ENDING_S = 0.0
with run_lock.run_lock(Path({str(tmp_path)!r}), print):
    child = os.fork()
    if child == 0:
        try:
            with run_lock.run_lock(Path({str(tmp_path)!r}), print):
                pass
        except run_lock.RunFolderError as error:
            os._exit(7 if str(os.getppid()) in str(error) else 8)
        os._exit(9)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "7\n"


def test_a_folder_made_for_the_lock_is_removed_unless_something_was_written_there(tmp_path):
    folder = tmp_path / "new" / "run"
    with run_lock(folder, print):
        assert folder.is_dir()
    assert not (tmp_path / "new").exists()
    with run_lock(folder, print):
        (folder / "config.yaml").write_text("")
    assert (folder / "config.yaml").exists()


def test_of_two_processes_that_make_a_folder_at_once_the_second_leaves_it_to_the_first(
    tmp_path, monkeypatch, impatient
):
    monkeypatch.setattr(module, "_try_lock", lambda handle: None)  # the other one was faster
    assert refused(tmp_path / "run").startswith(f"{tmp_path}/run: in use by another process")
    assert (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file" / "run") == f"{tmp_path}/file/run: cannot be made: Not a directory"
    (tmp_path / LOCK).mkdir()
    assert refused(tmp_path) == f"{tmp_path}: cannot be written to: Is a directory"


def test_a_lock_that_is_released_before_the_process_ends_leaves_nothing_to_take_over(tmp_path):
    with run_lock(tmp_path, print):
        release_all()
        assert (tmp_path / LOCK).read_bytes() == b""


def test_without_locks_a_living_process_of_this_machine_has_it(tmp_path, without_locks):
    left_by(tmp_path, this_process())
    assert f"process {os.getpid()} on {socket.gethostname()}" in refused(tmp_path)


def test_without_locks_a_process_that_has_ended_has_it_no_more(tmp_path, without_locks):
    other_start = replace(this_process(), started="1")  # the kernel gave its pid to another process
    ended = replace(this_process(), pid=2**22 + 1)
    for found in (other_start, ended):
        left_by(tmp_path, found)
        (line,) = taken(tmp_path)
        assert f"taken over from process {found.pid} on" in line


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_process_of_another_machine_has_it_while_it_renews_the_file(tmp_path, monkeypatch, request, has_locks):
    """With locks as well: this machine may not see those of others."""
    request.getfixturevalue("impatient" if has_locks else "without_locks")
    far = replace(this_process(), host="far", machine="another")
    left_by(tmp_path, far)
    stop = threading.Event()

    def renew():
        while not stop.wait(0.01):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        assert f"in use by process {far.pid} on far" in refused(tmp_path)
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    waits, line = taken(tmp_path)
    assert "waiting for up to 0.1 s for a sign of life" in waits
    assert "taken over" in line


def test_the_holder_renews_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with run_lock(tmp_path, print):
        os.utime(tmp_path / LOCK, (1, 1))
        until = module.time.monotonic() + 60
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert module.time.monotonic() < until
