"""How ranks find each other's processes on their host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from hpc_supcon.distributed.store import is_stopped, local_pid, process_id


def test_a_local_process_is_identified_by_host_pid_and_start_time():
    host, pid, started = process_id().split()
    assert local_pid(process_id()) == os.getpid()
    assert local_pid(f"{host} {pid} {int(started) - 1}") is None, "an earlier process with this pid"
    assert local_pid(f"elsewhere {pid} {started}") is None
    assert local_pid(f"{host} 999999999 {started}") is None
    assert local_pid(f"{host} {pid} ?") is None


def test_a_stopped_process_is_recognized():
    code = "import sys; from hpc_supcon.distributed.store import process_id\n"
    code += "print(process_id(), flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        process = child.stdout.readline().strip()
        assert not is_stopped(process)
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert is_stopped(process)
        child.send_signal(signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
        assert not is_stopped(process)
        child.kill()
    assert not is_stopped(process)
    assert not is_stopped(process_id())
