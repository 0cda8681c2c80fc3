"""The names of folders among the checkpoints of a run, and what they mean.

    step-N            published
    .partial-step-N   being written; means nothing
    .replaced-step-N  published, renamed because step N is being saved again: the checkpoint of step N until
                      step-N exists
    .deleted-step-N   being deleted; means nothing

A checkpoint appears, is replaced and disappears by one rename: a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
PARTIAL, REPLACED, DELETED = ".partial-", ".replaced-", ".deleted-"
_STEP = re.compile(rf"(?:{re.escape(REPLACED)})?step-(0|[1-9][0-9]{{0,18}})")


def step_of(name: str) -> int | None:
    """The step of the checkpoint with this folder name, published or replaced; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a listed step."""
    published, replaced = folder / f"step-{step}", folder / f"{REPLACED}step-{step}"
    return replaced if not os.path.lexists(published) and os.path.lexists(replaced) else published
