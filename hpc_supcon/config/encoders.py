"""Which encoders there are, without importing PyTorch or timm, which takes seconds."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from ..errors import ConfigError, unknown_name
from .schema.names import OwnEncoderName

OWN_ENCODERS: tuple[str, ...] = get_args(OwnEncoderName)

_REGISTERED = re.compile(rb"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def check_encoder(name: str) -> None:
    """Raise ConfigError, with the nearest names, unless there is an encoder called `name`."""
    if name in OWN_ENCODERS:
        return
    known = timm_models()
    if known is not None and name not in known:
        listed = f"{', '.join(OWN_ENCODERS)}, and all of timm.list_models()"
        raise ConfigError(unknown_name("model.encoder", name, [*OWN_ENCODERS, *known], listed=listed))


@cache
def timm_models() -> frozenset[str] | None:
    """The names of `timm.list_models()`, read from timm's source files (some 50 ms); None without timm."""
    found = find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return None
    files = Path(found.submodule_search_locations[0], "models").rglob("*.py")
    return frozenset(name.decode() for path in files for name in _REGISTERED.findall(path.read_bytes()))
