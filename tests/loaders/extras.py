"""Optional packages: missing ones skip their tests loudly, or fail them where the environment demands them."""

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
        torch.set_num_threads(threads)  # ffcv sets it when it is imported
