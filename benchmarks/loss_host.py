"""What a call of a loss with the Triton backend costs the host: operations, launches and microseconds; no GPU needed.

    python benchmarks/loss_host.py

Forward + backward, on CPU tensors. Operations are those that PyTorch dispatches. Triton prepares every launch as for
an H100 (kernels compiled for sm_90, arguments bound, the compiled kernel looked up), but its last step, the call of
the CUDA driver, is left out, as is the time of the device. CUDA's own cost of a launch comes on top, once per launch
and once per operation that is not a view or an allocation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from hpc_supcon import losses

LOSSES: dict[str, Callable[..., torch.nn.Module]] = {
    "out": losses.SupConLoss,
    "in": lambda tau, **options: losses.SupConLoss(tau, form="in", **options),
    "tcl": losses.TCLLoss,
    "tcl, learned temperature": lambda tau, **options: losses.TCLLoss(tau, learnable_temperature=True, **options),
}
H100 = SimpleNamespace(multi_processor_count=132)
FREE = (
    "view",
    "alias",
    "expand",
    "permute",
    "detach",
    "unsqueeze",
    "select",
    "slice",
    "unbind",
    "empty",
    "as_strided",
)
"""Operations that launch nothing on CUDA."""


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class PreparedLaunches:
    """In place of Triton's driver: an H100 whose launches end before the call of the CUDA driver."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), None, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = source.fn.__name__

        def launch(*_: Any) -> None:
            self.launches[name] += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda *_, **__: [1.0, 1.0, 1.0]  # the first configuration wins


@contextmanager
def on_an_h100() -> Iterator[PreparedLaunches]:
    driver = PreparedLaunches()
    triton.runtime.driver.set_active(driver)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=H100):
        yield driver


def calls(name: str, rows: int, dim: int) -> Callable[[], None]:
    loss = LOSSES[name](0.1, backend="triton", precision="bf16", validate=False)
    x = torch.randn(rows // 2, 2, dim, requires_grad=True)
    labels = torch.arange(rows // 2) % 10
    return lambda: loss(x, labels, rows_per_rank=[rows]).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="append", choices=list(LOSSES))
    parser.add_argument("--rows", type=int, default=64, help="few, as operations on the CPU cost time too")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--details", action="store_true", help="print the operations and kernels by name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| loss | operations | of these, launches | Triton launches | host, us: best | median |")
    print("|---|---|---|---|---|---|")
    with on_an_h100() as driver:
        for name in given.loss or LOSSES:
            call = calls(name, given.rows, given.dim)
            call()  # compiles
            driver.launches.clear()
            with Operations() as operations:
                call()
            kernels = Counter(driver.launches)
            taken = []
            for _ in range(given.runs):
                start = time.perf_counter()
                call()
                taken.append(1e6 * (time.perf_counter() - start))
            launching = sum(operation not in FREE for operation in operations.names)
            print(
                f"| {name} | {len(operations.names)} | {launching} | {kernels.total()} | {min(taken):.0f} | "
                f"{statistics.median(taken):.0f} |",
                flush=True,
            )
            if given.details:
                print(f"    {dict(Counter(operations.names))}\n    {dict(kernels)}")


if __name__ == "__main__":
    main()
