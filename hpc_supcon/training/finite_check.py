"""NaN and Inf: all ranks stop before the update, naming rank and step.

Loss and averaged gradients are the same on all ranks, so all find the same without talking. On the CPU a look at
them is free, and is taken at once. On a GPU it would make the host wait for the device in every step; there the
answer is used and kept on the device: a step that is not finite, and all after it, are taken back in full by a
selection between the state before and after, and the host reads the answer one step later, when it is there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed.collectives import gather_objects
from ..errors import NonFinite

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guard:
    """One run's. A step is `begin`, `check` before the update, `end`; `settle` before its result is used.

    deferred: on the device, as described above (default: on CUDA), which holds a second copy of all state and
    moves it twice. Counters that an optimizer or a queue keeps on the CPU are not taken back. Else `check` looks at
    once, when BatchNorm's running statistics have seen the batch already.
    """

    def __init__(self, device: torch.device, *, deferred: bool | None = None) -> None:
        self._deferred = device.type == "cuda" if deferred is None else deferred
        self._before: list[Tensor] = []
        self._state: list[Tensor] = []
        # whether a step was not finite, of all ranks and by this rank's own outputs; the first stays
        self._found = torch.zeros(2, dtype=torch.int64, device=device)
        self._read = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._pending: int | None = None
        self._begun = False

    def begin(self, changing: Callable[[], list[Tensor]]) -> None:
        """`changing()`: all tensors on the device that this step may change, each once; called where it is needed."""
        if not self._deferred:
            return
        self._state, self._begun = changing(), True
        if [t.shape for t in self._before] != [t.shape for t in self._state]:  # the optimizer's after the first step
            self._before = [torch.empty_like(t) for t in self._state]
        torch._foreach_copy_(self._before, self._state)

    def check(self, step: int, loss: Tensor, norm: Tensor, outputs: dict[str, Tensor]) -> None:
        """`step`: its number from 1; loss and norm of the gradients, 0-dim, equal on all ranks; this rank's outputs.

        Raises NonFinite on all ranks, for this step, or where deferred for the one before.
        """
        if not self._deferred:
            if not torch.isfinite(loss + norm):
                _stop(step, not all(bool(torch.isfinite(out).all()) for out in outputs.values()), loss)
            return
        self.settle()
        with torch.no_grad():
            own = torch.stack([out.sum(dtype=torch.float32) for out in outputs.values()]).sum()
            found = torch.stack([loss + norm, own]).isfinite().logical_not().to(torch.int64)
            torch.maximum(self._found, found, out=self._found)
        self._read.copy_(self._found, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._pending = step

    def end(self) -> None:
        """Take the step back on the device, bit by bit, unless it was finite."""
        if not self._begun:
            return
        self._begun = False
        bad = self._found[0]
        good = 1 - bad
        for dtype in {t.dtype for t in self._state}:
            kind = _INTEGERS[dtype.itemsize]  # as integers: zero times NaN is zero
            now = [t.view(kind) for t in self._state if t.dtype == dtype]
            before = [t.view(kind) for t in self._before if t.dtype == dtype]
            torch._foreach_mul_(now, good.to(kind))
            torch._foreach_mul_(before, bad.to(kind))
            torch._foreach_add_(now, before)

    def settle(self) -> None:
        """Wait for the answer on the last step. Raises NonFinite on all ranks."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        if self._copied is not None:
            self._copied.synchronize()
        if self._read[0]:
            self.end()  # of the step that has begun meanwhile
            _stop(step, bool(self._read[1]), None)


def _stop(step: int, here: bool, loss: Tensor | None) -> None:
    broken = [str(rank) for rank, bad in enumerate(gather_objects(here)) if bad]
    what = f"outputs of rank {', '.join(broken)}" if broken else "loss or gradients"
    value = "" if loss is None else f" (loss {float(loss):g})"
    raise NonFinite(
        f"step {step}: {what} became NaN or Inf{value}; stopped before the update. "
        "Lower optim.lr, warm up longer, or try train.precision=fp32"
    )
