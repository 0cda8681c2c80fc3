"""How a model on the Hugging Face Hub is named where a path could stand: hf:OWNER/NAME or hf:OWNER/NAME@REVISION."""

from __future__ import annotations

import re

from .errors import ConfigError

HUB = "hf:"
_NAME = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)


def is_on_hub(text: str) -> bool:
    return text.startswith(HUB)


def hub_name(setting: str, text: str) -> tuple[str, str | None]:
    """(name, revision) in `text`. Raises ConfigError, which names `setting`."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text:
        raise ConfigError(
            f"{setting}={text}: a model on the Hugging Face Hub is hf:OWNER/NAME, or with a branch, tag or commit "
            "hf:OWNER/NAME@REVISION"
        )
    return found["name"], found["revision"]
