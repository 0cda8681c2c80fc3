"""What glibc does with the memory that tensors free: kept for the next ones, or given back to the system."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """From now on glibc keeps what tensors free for the next ones; without glibc, nothing happens.

    By default it maps every large tensor anew, so that each step of a training on the CPU waits for the kernel to
    clear the same pages again. The price is memory that lies between tensors of different sizes.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def give_freed_memory_back() -> None:
    """To the system, what `keep_freed_memory` has kept so far."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
