"""Instructions per pair of the Triton kernels of the losses, compiled for sm_90a: no GPU is needed.

    python benchmarks/kernel_cost.py --dtype bf16 --dim 128 --form out --details

The real kernels are compiled as a launch on an H100 would compile them. "Per pair" are the instructions that a thread
executes for one tile without positive pairs, divided by the pairs of the tile that the thread has. An SM issues four
warp instructions per clock, and its tensor cores take 16 pairs (forward) or 8 (backward) per clock in bf16 at D 128:
above 8 and 16 instructions per pair they wait for the other units. tf32 and D 256 take twice as long per pair.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

# The kernels that are measured are those for the device, whatever the environment says.
os.environ.pop("TRITON_INTERPRET", None)
import triton
from sass import LoopCost, loop_cost
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hpc_supcon.losses import triton_kernels as kernels
from hpc_supcon.losses import triton_sizes as sizes

SHARED_BYTES = {80: 166912, 90: 232448}
"""Shared memory of one block on an A100 and an H100."""
FORMS = {"out": False, "in": False, "tcl": True}
"""Form -> whether the kernel has the second exponential."""


def compile_kernel(kernel: Any, form: str, dtype: str, dim: int, config: Any, capability: int = 90) -> Any:
    """The kernel as a launch would compile it. dtype: bf16 or tf32; `config`: one of `configurations`."""
    number, itemsize = ("bf16", 2) if dtype == "bf16" else ("fp32", 4)
    depth = sizes.operand_depth(dim)
    constants = {
        "CHUNK": sizes.operand_chunk(depth, itemsize),
        "DEPTH": depth,
        "INVERSE": FORMS[form],
        "PRECISION": "tf32",
        "BF16": dtype == "bf16",
        **config.kwargs,
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {"own_u": f"*{number}", "u": f"*{number}", "bounds": "*i32", "weights": "*fp32", "temperature": "*fp64"}
    types["out"] = f"*{number}" if kernel is kernels.pair_gradient_kernel else "*fp32"
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("span", "stride")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def configurations(kernel: Any, dtype: str, dim: int, capability: int = 90) -> list[Any]:
    itemsize = 2 if dtype == "bf16" else 4
    accumulates = kernel is kernels.gradient_kernel
    return sizes.configurations(sizes.operand_depth(dim), itemsize, SHARED_BYTES[capability], accumulates=accumulates)


def backward_kernel(dtype: str, dim: int) -> Any:
    """The kernel of the gradient; where that is multiplied strip by strip, the one that writes a strip of G."""
    depth = sizes.operand_depth(dim)
    in_one_product = sizes.operand_chunk(depth, 2 if dtype == "bf16" else 4) == depth
    return kernels.gradient_kernel if in_one_product else kernels.pair_gradient_kernel


def cost(kernel: Any, form: str, dtype: str, dim: int, config: Any) -> tuple[LoopCost, int]:
    """The common loop's cost, and the pairs of a tile that one thread has."""
    depth = sizes.operand_depth(dim)
    compiled = compile_kernel(kernel, form, dtype, dim, config)
    pairs = config.kwargs["ROWS"] * config.kwargs["COLS"] // (32 * config.num_warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        chunks = depth // sizes.operand_chunk(depth, 2 if dtype == "bf16" else 4)
        return loop_cost(Path(file.name), pairs, chunks), pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", action="append", choices=list(FORMS))
    parser.add_argument("--kernel", action="append", choices=["forward", "backward"])
    parser.add_argument("--dtype", action="append", choices=["bf16", "tf32"])
    parser.add_argument("--dim", action="append", type=int)
    parser.add_argument("--config", type=int, action="append", help="positions in the list of configurations")
    parser.add_argument("--details", action="store_true", help="print the instructions by name")
    given = parser.parse_args()
    print("| form | kernel | dtype | D | tile, warps, stages | registers | stack | instructions/pair | BAR/tile |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, dtype, dim, form in product(
        given.kernel or ["forward", "backward"],
        given.dtype or ["bf16", "tf32"],
        given.dim or [128, 256, 512],
        given.form or FORMS,
    ):
        kernel = kernels.sums_kernel if name == "forward" else backward_kernel(dtype, dim)
        found = configurations(kernel, dtype, dim)
        for config in [found[i] for i in given.config or [0]]:
            shape = f"{config.kwargs['ROWS']}x{config.kwargs['COLS']}, {config.num_warps}, {config.num_stages}"
            loop, pairs = cost(kernel, form, dtype, dim, config)
            each = loop.instructions.total() / pairs
            print(
                f"| {form} | {name} | {dtype} | {dim} | {shape} | {loop.registers} | {loop.stack_bytes} | "
                f"{each:.1f} | {loop.barriers} |",
                flush=True,
            )
            if given.details:
                for instruction, n in loop.instructions.most_common(24):
                    print(f"    {instruction:20} {n:6} {n / pairs:7.2f}")


if __name__ == "__main__":
    main()
