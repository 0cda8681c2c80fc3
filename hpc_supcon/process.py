"""Whether a process is alive, from /proc: a pid alone is not enough, because the kernel uses it again."""

from __future__ import annotations

from pathlib import Path

STATE, START_TIME = 3, 22
"""Fields of /proc/PID/stat. The start time is in clock ticks since boot."""
UNKNOWN = "?"


def process_field(pid: int, field: int) -> str:
    """One field of /proc/PID/stat, from the third on; UNKNOWN where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[field - 3]
    except (OSError, IndexError):
        return UNKNOWN
