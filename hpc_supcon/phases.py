"""Names for the phases of a training step, for the profiler's trace and for a clock:

    with phase("loss"):
        ...

While nothing is measured this costs next to nothing: no event on the device, no range in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

REST = "rest"
"""The time outside all phases."""
ENCODER, PROJECTION, LOSS = "encoder", "projection", "loss"
BACKWARD = " backward"
"""Suffix of the phases of the backward pass."""


class Clock:
    """Divides time among phases: at every moment exactly one is running, so that they add up to the total.

    On CUDA their borders are events in the current stream: the time is the device's, and the host does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._borders: list[tuple[str, float | torch.cuda.Event]] = []
        self._running = REST
        self.seen: set[str] = set()
        self.switch(REST)

    def switch(self, name: str) -> str:
        """Start phase `name`, which ends the current one; returns the current one."""
        before, self._running = self._running, name
        self.seen.add(name)
        self._borders.append((name, self._now()))
        return before

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the clock was created. Waits for the device."""
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
"""At most one: the clock that measures at the moment."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is phase `name`; the time of a phase inside it does not count for this one."""
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
    """Inside, phases are timed by `clock`, and the time of `model`'s encoder is separated from that of its heads.

    model: a PretrainingModel. The projection phase starts with the encoder's output; the encoder's backward phase
    starts with the gradient of that output. The hooks change no result.
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
    """Start the backward phase of `name`, which computed `tensor`, when the gradient of `tensor` is ready."""
    if not _clocks or not tensor.requires_grad:
        return
    clock = _clocks[0]
    if name == PROJECTION and PROJECTION not in clock.seen:
        name = ENCODER  # both are compiled into one graph, which has no border between them

    def enter(_gradient: Tensor) -> None:
        clock.switch(name + BACKWARD)

    tensor.register_hook(enter)
