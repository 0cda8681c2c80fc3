"""The phases of a training step, named where they happen: for the profiler's trace and for a clock.

    with phase("loss"):
        ...

costs next to nothing while nobody measures: no message to the device, no range.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

REST = "rest"
"""What runs while no phase does."""
ENCODER, PROJECTION, LOSS = "encoder", "projection", "loss"
BACKWARD = " backward"
"""Ends the names of phases that are parts of the backward pass."""


class Clock:
    """Divides time among phases: at every moment exactly one runs, so that they add up to the whole.

    On CUDA the borders are events in the current stream: the time is the device's, and the host goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._borders: list[tuple[str, float | torch.cuda.Event]] = []
        self._running = REST
        self.seen: set[str] = set()
        self.switch(REST)

    def switch(self, name: str) -> str:
        """From now on `name` runs; returns what ran before."""
        before, self._running = self._running, name
        self.seen.add(name)
        self._borders.append((name, self._now()))
        return before

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the clock began. Waits for the device."""
        self.switch(self._running)
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (name, start), (_, end) in zip(self._borders[:-1], self._borders[1:], strict=True):
            seconds[name] = seconds.get(name, 0.0) + _between(start, end)
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert not isinstance(start, float)
    assert not isinstance(end, float)
    return start.elapsed_time(end) / 1000


_clocks: list[Clock] = []
"""The one that measures, if any does."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is phase `name`; a phase inside it takes its time out of this one's."""
    clock, traced = _clocks[0] if _clocks else None, torch._C._autograd._profiler_enabled()
    if clock is None and not traced:
        yield
        return
    before = None if clock is None else clock.switch(name)
    try:
        if traced:
            with torch.profiler.record_function(f"step/{name}"):
                yield
        else:
            yield
    finally:
        if clock is not None and before is not None:
            clock.switch(before)


@contextmanager
def measured_by(clock: Clock, model: nn.Module) -> Iterator[None]:
    """Inside, phases are timed by `clock`, and `model`'s encoder is told from its heads in both directions.

    model: a PretrainingModel. Its encoder's output is where the projection begins; the gradient's arrival
    there is where the encoder's backward pass does. Hooks only look: nothing that is computed changes.
    """
    assert not _clocks, "one clock at a time"

    def on_features(_module: nn.Module, _inputs: object, features: Tensor) -> None:
        clock.switch(PROJECTION)
        on_gradient(features, ENCODER)

    encoder = model.encoder
    assert isinstance(encoder, nn.Module)
    hook = encoder.register_forward_hook(on_features)
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)
        hook.remove()


def on_gradient(tensor: Tensor, name: str) -> None:
    """Once the gradient of `tensor` is known, the backward pass is in phase `name`: what made `tensor`."""
    if not _clocks or not tensor.requires_grad:
        return
    clock = _clocks[0]
    if name == PROJECTION and PROJECTION not in clock.seen:
        name = ENCODER  # compiled into one graph, where no border is to be seen

    def enter(_gradient: Tensor) -> None:
        clock.switch(name + BACKWARD)

    tensor.register_hook(enter)
