"""Tests on a GPU: all carry the marker `cuda` (`pytest -m cuda` runs them alone), skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

T = TypeVar("T", bound=Callable[..., object])
_MARKS = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=_MARKS)]
"""For `parametrize`: a claim that holds on both."""


def needs_cuda(test: T) -> T:
    """A test that only a GPU can run."""
    for mark in _MARKS:
        test = mark(test)
    return test
