"""The names in a folder of checkpoints, and what each of them means.

    step-N            published
    .partial-step-N   being written; means nothing
    .replaced-step-N  published, renamed aside because step N is being saved again: stands for step N until
                      step-N is there
    .deleted-step-N   no longer wanted; means nothing

A checkpoint changes its meaning by one rename, so a kill at any moment leaves either the old or the new.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
PARTIAL, REPLACED, DELETED = ".partial-", ".replaced-", ".deleted-"
_STEP = re.compile(rf"(?:{re.escape(REPLACED)})?step-(0|[1-9][0-9]{{0,18}})")


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of this name is, published or replaced; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a listed step lies."""
    published, replaced = folder / f"step-{step}", folder / f"{REPLACED}step-{step}"
    return replaced if not os.path.lexists(published) and os.path.lexists(replaced) else published
