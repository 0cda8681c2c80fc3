"""Which encoders there are, without importing PyTorch or timm, which takes seconds."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from ..errors import ConfigError, unknown_name
from ..parts import is_own, is_path, registered
from .schema.names import OwnEncoderName

OWN_ENCODERS: tuple[str, ...] = get_args(OwnEncoderName)

_REGISTERED = re.compile(rb"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def check_encoder(name: str) -> None:
    """Raise ConfigError, with the nearest names, unless there is an encoder called `name`."""
    if is_own_encoder(name) or name in OWN_ENCODERS:
        return
    known = timm_models()
    if known is not None and name not in known:
        listed = f"{', '.join(OWN_ENCODERS)}, and all of timm.list_models()"
        raise ConfigError(
            unknown_name("model.encoder", name, [*OWN_ENCODERS, *registered("encoders"), *known], listed=listed)
        )


def is_own_encoder(name: str) -> bool:
    """Whether it is neither of this package nor of timm. Raises PartError as `parts.is_own`."""
    if not is_path(name) and name not in registered("encoders"):
        return False  # without reading timm's files
    return is_own("encoders", name, (*OWN_ENCODERS, *(timm_models() or ())))


@cache
def timm_models() -> frozenset[str] | None:
    """The names of `timm.list_models()`, read from timm's source files (some 50 ms); None without timm."""
    found = find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return None
    files = Path(found.submodule_search_locations[0], "models").rglob("*.py")
    return frozenset(name.decode() for path in files for name in _REGISTERED.findall(path.read_bytes()))
