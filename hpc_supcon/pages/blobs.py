"""Bytes in a page, as base64 text: the same bytes once, and not more than a page may hold."""

from __future__ import annotations

import base64
import hashlib

MAX_BYTES = 12_000_000
"""Of all blobs of a page, as text: it is opened by browsers of phones too."""


class Blobs:
    """The texts by key, for the page's script."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.texts: dict[str, str] = {}
        self._left = max_bytes

    def add(self, payload: bytes) -> str | None:
        """The key of these bytes, or None where there is no room for them."""
        key = hashlib.sha256(payload).hexdigest()[:12]
        if key not in self.texts:
            text = base64.b64encode(payload).decode("ascii")
            if len(text) > self._left:
                return None
            self.texts[key] = text
            self._left -= len(text)
        return key
