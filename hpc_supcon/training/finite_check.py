"""The check for NaN and Inf: a non-finite step ends the run on all ranks, and nothing of it is saved.

Loss and averaged gradients are equal on all ranks, so all ranks come to the same answer without a message. The
numbers are computed on the device and copied to the host without waiting. Where the host should not wait for the
device in every step (StepOptions.defer_finite_check), they are read one step later: before the next update, and
before anything is logged, validated or saved (TrainState.confirm_finite). By then the weights may hold the
non-finite step; that is harmless, because the run ends there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed.collectives import gather_objects
from ..errors import NonFinite


class FiniteCheck:
    """The check of one step. Creating it only starts the computation; `confirm` waits for the answer."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor, outputs: dict[str, Tensor]) -> None:
        """`step`: counted from 1; `loss` and `norm` of the gradients: 0-dim, equal on all ranks; `outputs`: of this
        rank, to say which rank a non-finite number came from."""
        self._step = step
        with torch.no_grad():
            own = torch.stack([out.sum(dtype=torch.float32) for out in outputs.values()]).sum()
            numbers = torch.stack([loss.double(), norm.double(), own.double()])
        self._numbers, self._copied = _to_host(numbers)

    def confirm(self) -> None:
        """Wait for the numbers. Raises NonFinite, on all ranks, when the step was not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, own = self._numbers.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ranks = [str(rank) for rank, finite in enumerate(gather_objects(math.isfinite(own))) if not finite]
        what = f"outputs of rank {', '.join(ranks)}" if ranks else "loss or gradients"
        raise NonFinite(
            f"step {self._step}: {what} became NaN or Inf (loss {loss:g}); training ends, and this step is not "
            "saved. Lower optim.lr, warm up longer, or try train.precision=fp32"
        )


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(a copy in host memory, the event after which it is complete; None: it is complete already)."""
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied
