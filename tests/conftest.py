from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from pathlib import Path

# Small tensors and matrices: a second thread costs more than it brings, above all where tests share the cores with
# others and with ranks. Before numpy and torch are imported, for their children as well.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# as in a reader's shell: what a process prints is buffered, and its last flush comes when it ends
os.environ.pop("PYTHONUNBUFFERED", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# no examples fail, and none are refused, because others use the machine; a fixture's folder may serve many examples
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("tests", deadline=None, suppress_health_check=SUPPRESSED)
settings.load_profile("tests")

LONGEST = (
    "unit/api/test_notebook.py", "docs/test_blocks.py", "unit/cli/test_app.py", "unit/cli/test_own_parts.py",
    "unit/cli/test_refused.py", "dist/test_start_page.py", "unit/api/test_objects.py", "unit/losses/test_triton.py",
    "dist/test_shards_ranks.py", "unit/bench/test_gpu_in_miniature.py", "examples/test_sources.py",
    "unit/test_examples_of_models.py", "dist/test_step.py", "unit/export/test_push.py", "unit/models/test_hub.py",
)  # fmt: skip
"""Files of more than 75 seconds, in this order before all others: one that begins at the end is waited for."""
TRACED_CASES = 3
"""Of each parametrized test, so many are traced for coverage: others run the same lines, at up to twice the time."""
TRACED = pytest.StashKey[bool]()


def pytest_addoption(parser):
    parser.addoption("--no-training", action="store_true", help="skip each test at its first step of training")


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    cases = Counter()
    for item in items:
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        item.stash[TRACED] = item.path not in order and cases[function] <= TRACED_CASES


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Processes and threads that a test starts are traced all the same."""
    tracer = sys.gettrace()
    if tracer is not None and not item.stash[TRACED]:
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session", autouse=True)
def _no_training(request):
    """What a test does decides, so that no list of tests that train has to be kept."""
    if request.config.getoption("--no-training"):
        from hpc_supcon.training import fit

        fit.train_step = lambda *arguments: pytest.skip("trains")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def python() -> str:
    return sys.executable


@pytest.fixture
def forked_not_spawned(monkeypatch):
    """Fork the processes that a benchmark would spawn, from a server that has imported what they need."""
    from tests.processes import FORK_SERVER

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORK_SERVER)


@pytest.fixture
def own_code(monkeypatch):
    """Import paths that a test allows, modules that it imports and packages that it installs are forgotten after
    it."""
    from hpc_supcon import known_names, parts

    def forget():
        known_names.allowed.clear()
        parts._imported.cache_clear()
        parts._entry_points.cache_clear()

    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()
    for name in set(sys.modules) - before:
        if not name.startswith(("hpc_supcon", "tests", "torch")):
            module = sys.modules[name]
            if str(getattr(module, "__file__", None) or "").startswith(("/tmp", os.environ.get("TMPDIR", "/tmp"))):
                del sys.modules[name]
