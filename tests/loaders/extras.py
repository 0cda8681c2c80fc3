"""Optional packages: a missing one skips its tests with a reason, or fails them where the environment requires it."""

from __future__ import annotations

import importlib
import os

import pytest


def require(module: str, install: str, what: str = "its loader") -> None:
    """Skip (or fail) the module that calls this at import when the package cannot be imported."""
    import torch

    threads = torch.get_num_threads()
    try:
        importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} CANNOT BE IMPORTED ({error}), {what} is NOT TESTED. To install: {install}"
        if os.environ.get("HPC_SUPCON_REQUIRE_EXTRAS") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)
    finally:
        torch.set_num_threads(threads)  # importing ffcv sets it
