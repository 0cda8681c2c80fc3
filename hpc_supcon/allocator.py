"""Whether glibc keeps the memory of freed tensors for the next ones, or returns it to the system."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones. Without glibc, nothing happens.

    By default it maps new pages for every large tensor, so that each training step on the CPU waits for the kernel to
    clear the same pages again. The price is memory lost to fragmentation between tensors of different sizes.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def release_freed_memory() -> None:
    """Return to the system what `keep_freed_memory` has kept so far."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
