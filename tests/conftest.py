from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def python() -> str:
    return sys.executable
