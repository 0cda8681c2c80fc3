"""Names of earlier versions that run folders may hold: read as the new ones, for one release."""

from __future__ import annotations

from typing import Any

SETTINGS = {
    "augment.grey": "grayscale",
    "probe.linear.standardise": "standardize",
    "probe.softmax.standardise": "standardize",
    "probe.logistic.standardise": "standardize",
    "probe.mlp.standardise": "standardize",
    "probe.linear.optimiser": "optimizer",
    "probe.softmax.optimiser": "optimizer",
    "probe.logistic.optimiser": "optimizer",
    "probe.mlp.optimiser": "optimizer",
    "probe.finetune.optimiser": "optimizer",
}
"""Old name of a setting -> its new name in the same section of the configuration."""

STATE = {"normalisation": "normalization", "standardise": "standardize", "looked": "last_validated_step"}
"""The same for the keys of state.json and of an exported file's metadata, at any depth."""


def new_state(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with the keys of this version."""
    return {
        STATE.get(key, key): new_state(value) if isinstance(value, dict) else value for key, value in state.items()
    }
