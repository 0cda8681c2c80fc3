"""Instructions per pair of the Triton kernels of the losses, compiled for sm_90a: no GPU is needed.

    python benchmarks/kernel_cost.py --dtype bf16 --dim 128 --form out --details

The real kernels are compiled as a launch on an H100 would compile them. "Per pair" are the instructions that a thread
executes for one tile without positive pairs, divided by the pairs of the tile that the thread has. An SM issues four
warp instructions per clock, and its tensor cores take 16 pairs (forward) or 8 (backward) per clock in bf16 at D = 128:
above 8 and 16 instructions per pair they wait for the other units.
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

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"u": None, "class_ids": "*i32", "out": "*fp32", "row_weights": "*fp32"}
FORMS = {"out": False, "in": False, "tcl": True}


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int) -> Any:
    """The compiled kernel, with pointers and D divisible by 16, as PyTorch gives them."""
    names = kernel.arg_names
    types = {**POINTERS, "u": f"*{dtype}", "temperature": "fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "D"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGET, options=options)


def cost(kernel: Any, config: Any, form: str, dtype: str, dim: int) -> tuple[LoopCost, float]:
    """The common loop's cost, and the pairs of a tile that one thread has."""
    backend = kernels.TritonBackend("bf16" if dtype == "bf16" else "tf32")
    depth = max(16, triton.next_power_of_2(dim))
    chunk = backend._chunk(depth)
    constants = dict(CHUNK=chunk, DEPTH=depth, INVERSE=FORMS[form], PRECISION="tf32", UPCAST=False, **config.kwargs)
    if "WIDTH" in kernel.arg_names:
        constants["WIDTH"] = min(depth, kernels._WIDEST_GRADIENT)
    compiled = compile_kernel(kernel, constants, "bf16" if dtype == "bf16" else "fp32", config.num_warps, config.num_stages)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        found = loop_cost(Path(file.name), depth // chunk)
    return found, config.kwargs["ROWS"] * config.kwargs["COLS"] / (32 * config.num_warps)


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
    table = {"forward": kernels._sums_kernel.fn, "backward": kernels._gradient_kernel.fn}
    configs = kernels._configs()
    for name, dtype, dim, form in product(
        given.kernel or table, given.dtype or ["bf16", "tf32"], given.dim or [128, 256, 512], given.form or FORMS
    ):
        for config in [configs[i] for i in given.config or [0]]:
            shape = f"{config.kwargs['ROWS']}x{config.kwargs['COLS']}, {config.num_warps}, {config.num_stages}"
            found, pairs = cost(table[name], config, form, dtype, dim)
            each = found.instructions.total() / pairs
            print(
                f"| {form} | {name} | {dtype} | {dim} | {shape} | {found.registers} | {found.stack_bytes} | "
                f"{each:.1f} | {found.barriers} |",
                flush=True,
            )
            if given.details:
                for instruction, n in found.instructions.most_common(24):
                    print(f"    {instruction:20} {n:6} {n / pairs:7.2f}")


if __name__ == "__main__":
    main()
