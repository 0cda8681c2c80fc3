"""Python's cyclic garbage, collected on all ranks at the same steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..phases import phase


@contextmanager
def collected_every(steps: int | None) -> Iterator[Callable[[int], None]]:
    """Inside, garbage is collected only by the function given, called with each step: at every `steps`-th one.

    Left to itself each rank would pause at a step of its own, and all others wait for it in the next collective.
    What exists at the start is not looked at again, so that a collection takes milliseconds. None: Python
    decides, as always.
    """
    if steps is None or not gc.isenabled():
        yield lambda step: None
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda step: None if step % steps else _collect()
    finally:
        gc.enable()
        gc.unfreeze()


@phase("garbage")
def _collect() -> None:
    gc.collect()
