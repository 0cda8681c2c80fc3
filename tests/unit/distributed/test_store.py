"""How ranks identify processes on their host."""

from __future__ import annotations

import os

from hpc_supcon.distributed.store import local_pid, process_id


def test_a_local_process_is_identified_by_host_pid_and_start_time():
    host, pid, started = process_id().split()
    assert local_pid(process_id()) == os.getpid()
    assert local_pid(f"{host} {pid} {int(started) - 1}") is None, "an earlier process with this pid"
    assert local_pid(f"elsewhere {pid} {started}") is None
    assert local_pid(f"{host} 999999999 {started}") is None
    assert local_pid(f"{host} {pid} ?") is None
