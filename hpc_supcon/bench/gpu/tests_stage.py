"""Stage tests: `pytest -m cuda`, whose outcomes are read while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .work import Work

ROOT = Path(__file__).parents[3]
TESTS = ROOT / "tests"
MARK = re.compile(r"^from (tests)?\.+devices import ", re.MULTILINE)
"""In a file with such tests."""
WORKERS = 8
"""Processes: Triton compiles a kernel on one core."""
KEPT = 40
"""Lines of pytest's summary of failures, at most."""


def run(work: Work) -> None:
    if find_spec("pytest") is None or not TESTS.is_dir():
        work.skip("tests", "pytest is not installed" if TESTS.is_dir() else f"{TESTS} is not there; copy it along")
        return
    counts: Counter[str] = Counter()
    failed: list[str] = []
    process = subprocess.Popen(
        command(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    last: list[str] = []
    for line in process.stdout:
        last = [*last, line.rstrip()][-KEPT:]
        if (found := outcome(line)) is not None:
            counts[found[0]] += 1
            if found[0] in ("failed", "error"):
                failed.append(found[1])
                print(line.rstrip(), flush=True)
            work.record.fact(**counts, failed_tests=failed)
    code = process.wait()
    work.record.fact(**counts, failed_tests=failed, exit_code=code)
    print(", ".join(f"{n} {name}" for name, n in counts.items()) or "no tests", flush=True)
    if code:
        print("\n".join(last), file=sys.stderr)
        work.failed.append(f"pytest, exit code {code}")


def command() -> list[str]:
    """Only the files that have such tests: others may need packages that are not installed."""
    files = [str(p.relative_to(ROOT)) for p in sorted(TESTS.rglob("test_*.py")) if MARK.search(p.read_text("utf-8"))]
    parallel = ["-n", str(WORKERS), "--dist", "worksteal"] if _is_parallel() else []
    options = ["-v", "-m", "cuda", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    # warnings of other versions than this package is developed with are no failures here
    return [sys.executable, "-u", "-m", "pytest", *options, "-W", "default", *parallel, *files]


def _is_parallel() -> bool:
    import torch

    return torch.cuda.is_available() and find_spec("xdist") is not None


def outcome(line: str) -> tuple[str, str] | None:
    """(outcome, test) of one line of `pytest -v`, with or without xdist; None for another line."""
    # "tests/a.py::test_b PASSED [ 3%]" or "[gw0] [ 3%] PASSED tests/a.py::test_b"
    words = line.split()
    place = next((i for i, w in enumerate(words) if w in ("PASSED", "FAILED", "SKIPPED", "ERROR")), None)
    if place is None or not ("[" in line and "%]" in line):
        return None
    names = [w for w in words if w.startswith("tests/")]
    return words[place].lower(), names[0] if names else ""
