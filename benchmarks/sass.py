"""What a compiled kernel costs on its common path, read from its machine code: no GPU is needed.

`loop_cost` finds the loop over column tiles in a cubin and follows its shortest way round: the way of a tile without
positive pairs. Loops within it (chunks of the feature dimensions) count as often as they run.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_TENSOR_CORES = ("HGMMA", "HMMA")
# The operations whose variants are counted apart, with the number of parts of the name to keep.
_DETAILED = ("MUFU", "BAR", "WARPGROUP")


@dataclass(frozen=True)
class LoopCost:
    """The common loop of one kernel: its resources, and the instructions that one thread executes for one tile."""

    registers: int
    stack_bytes: int
    instructions: Counter[str]

    @property
    def barriers(self) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith("BAR"))


def _dump(*arguments: str) -> str:
    return subprocess.run([str(_CUOBJDUMP), *arguments], check=True, capture_output=True, text=True).stdout


def _name(text: str) -> str:
    parts = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")
    return ".".join(parts[:2]) if parts[0] in _DETAILED else parts[0]


@dataclass(frozen=True)
class _Loop:
    start: int
    end: int


def _jump(text: str) -> int | None:
    """The target of a branch; None for any other instruction, and for the slow path of a divergent warp."""
    if not re.search(r"\bBRA\b", text) or "BRA.DIV" in text:
        return None
    target = _TARGET.search(text)
    return int(target.group(1), 16) if target else None


class _Code:
    """The instructions of one kernel, by position."""

    def __init__(self, sass: str) -> None:
        found = [match for line in sass.splitlines() if (match := _LINE.match(line))]
        self.texts = [match.group(2) for match in found]
        position = {int(match.group(1), 16): i for i, match in enumerate(found)}
        self.names = [_name(text) for text in self.texts]
        self.jumps = {i: position[to] for i, text in enumerate(self.texts) if (to := _jump(text)) in position}

    def loops(self) -> list[_Loop]:
        """By their start; a jump backwards closes one."""
        ends: dict[int, int] = {}
        for i, to in self.jumps.items():
            if to < i:
                ends[to] = max(i, ends.get(to, 0))
        return [_Loop(start, end) for start, end in sorted(ends.items())]

    def way_round(self, loop: _Loop) -> list[int]:
        """Positions of the shortest way from the loop's start to its end."""
        before: dict[int, int] = {}
        queue = [(1, loop.start, -1)]
        while queue:
            length, i, origin = heapq.heappop(queue)
            if i in before:
                continue
            before[i] = origin
            if i == loop.end:
                break
            following = []
            ends_here = self.names[i] in ("BRA", "EXIT", "RET") and "BRA.DIV" not in self.texts[i]
            if self.texts[i].startswith("@") or not ends_here:
                following.append(i + 1)
            if self.jumps.get(i, 0) > i:
                following.append(self.jumps[i])
            for j in following:
                if loop.start <= j <= loop.end:
                    heapq.heappush(queue, (length + 1, j, i))
        way, i = [], loop.end
        while i != -1:
            way.append(i)
            i = before[i]
        return way[::-1]

    def has(self, loop: _Loop, *names: str) -> bool:
        return any(name.startswith(names) for name in self.names[loop.start : loop.end + 1])


def loop_cost(cubin: Path, exponentials: int, chunks: int = 1) -> LoopCost:
    """The cost of the loop with products and `exponentials` on its shortest way round; of several, the shortest.

    The number tells the loop over whole tiles from the one over parts of tiles, which may be the shorter one.
    `chunks`: how often its inner loop runs, where it has one. Raises ValueError where there is no such loop.
    """
    used = re.search(r"REG:(\d+) STACK:(\d+)", _dump("-res-usage", str(cubin)))
    code = _Code(_dump("-sass", str(cubin)))
    loops = code.loops()
    costs = []
    for loop in loops:
        inner = [o for o in loops if loop.start < o.start and o.end < loop.end and code.has(o, *_TENSOR_CORES)]
        if not (code.has(loop, "MUFU.EX2") and code.has(loop, *_TENSOR_CORES)):
            continue
        if any(code.has(o, "MUFU.EX2") for o in inner):
            continue  # a loop around the one that is looked for
        way = code.way_round(loop)
        counts = Counter(code.names[i] for i in way)
        for o in inner:
            for i in code.way_round(o):
                counts[code.names[i]] += chunks - 1 if i in way else chunks
        if counts["MUFU.EX2"] == exponentials:
            costs.append(counts)
    if used is None or not costs:
        raise ValueError(f"{cubin}: no loop with {exponentials} exponentials and products of matrices")
    return LoopCost(int(used.group(1)), int(used.group(2)), min(costs, key=lambda c: c.total()))
