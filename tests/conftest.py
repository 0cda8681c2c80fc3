from __future__ import annotations

import sys

import pytest
import torch

# small tensors: a second thread costs more than it brings, above all where tests share the cores with ranks
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def python() -> str:
    return sys.executable
