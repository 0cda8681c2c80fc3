"""Images that an evaluation leaves out because they do not decode: counted, for results.json and for the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..data import Source, Splits
from ..distributed.collectives import all_sum
from ..distributed.launch import Runtime
from ..errors import CorruptSample
from ..terminal import warn


def count_left_out(source: Source, labels: Tensor) -> int:
    """How many images of `source` all ranks together left out, because they do not decode. Collective.

    labels: [n_r], of this rank's rows. Raises CorruptSample on every rank where no image is left.
    """
    rows = int(all_sum(labels.new_tensor(len(labels))))
    if rows == 0:
        raise CorruptSample(f"none of the {len(source)} images decodes: `hpc-supcon verify` names them")
    return len(source) - rows


def left_out_entry(left_out: Mapping[str, int]) -> dict[str, Any]:
    """{"left_out": images by split} for an entry of results.json; empty where none was left out."""
    counts = {split: n for split, n in left_out.items() if n}
    return {"left_out": counts} if counts else {}


def tell_left_out(results: Iterable[Mapping[str, Any]], splits: Splits, runtime: Runtime) -> None:
    """Rank 0 prints a line about every split of which an image was left out, from entries of results.json."""
    counts = {split: n for result in results for split, n in result.get("left_out", {}).items()}
    for split, n in counts.items():
        if runtime.is_main:
            warn(
                f"{n} of {len(getattr(splits, split))} {split} images cannot be decoded and are left out "
                "(data.on_corrupt=replace); `hpc-supcon verify` names them"
            )
