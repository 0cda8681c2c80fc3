"""The training pass through torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from .base import Compile


def compiler(*, enabled: bool, cuda_graphs: bool) -> Compile:
    """What makes a module's call faster; the module itself, its names and its other callers stay as they are.

    Every shape has its own code (`dynamic=False`): training has one, or two where the last piece of a batch is
    smaller. cuda_graphs: replayed as CUDA graphs, which need shapes that never change.
    """
    if not enabled:
        return lambda call: call
    if not cuda_graphs:
        return lambda call: torch.compile(call, dynamic=False)

    def graphed(call: Any) -> Any:
        replay = torch.compile(call, dynamic=False, mode="reduce-overhead")

        def run(*args: Any) -> Any:
            # what the last step's graphs returned is overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()
            return replay(*args)

        return run

    return graphed
