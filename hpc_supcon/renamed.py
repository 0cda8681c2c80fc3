"""Names of earlier versions: read as the new ones for one minor release, with a warning (see old_names.py)."""

from __future__ import annotations

from typing import Any, NamedTuple


class Renamed(NamedTuple):
    new: str
    gone_in: str
    """The version that no longer reads the old name; a test fails when this version is reached."""


SETTINGS = {
    "augment.grey": Renamed("grayscale", "0.3.0"),
    "probe.linear.standardise": Renamed("standardize", "0.3.0"),
    "probe.softmax.standardise": Renamed("standardize", "0.3.0"),
    "probe.logistic.standardise": Renamed("standardize", "0.3.0"),
    "probe.mlp.standardise": Renamed("standardize", "0.3.0"),
    "probe.linear.optimiser": Renamed("optimizer", "0.3.0"),
    "probe.softmax.optimiser": Renamed("optimizer", "0.3.0"),
    "probe.logistic.optimiser": Renamed("optimizer", "0.3.0"),
    "probe.mlp.optimiser": Renamed("optimizer", "0.3.0"),
    "probe.finetune.optimiser": Renamed("optimizer", "0.3.0"),
}
"""Old name of a setting -> its new name in the same section of the configuration."""

NAMES: dict[str, Renamed] = {}
"""Old name of `import hpc_supcon as hs` -> its new name there. None has been renamed yet."""

STATE = {"normalisation": "normalization", "standardise": "standardize", "looked": "last_validated_step"}
"""The same for the keys of state.json and of an exported file's metadata, at any depth. No user writes these: they
are read without a warning."""


def new_state(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with the keys of this version."""
    return {
        STATE.get(key, key): new_state(value) if isinstance(value, dict) else value for key, value in state.items()
    }
