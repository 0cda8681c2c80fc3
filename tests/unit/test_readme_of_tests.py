"""Every test that tests/README.md or conftest.py names exists."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import LONGEST

TESTS = Path(__file__).parents[1]


def test_the_tests_that_the_readme_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", (TESTS / "README.md").read_text())
    assert len(named) > 50
    for file, test in named:
        path = TESTS.parent / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"


def test_the_files_that_are_handed_out_first_exist():
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)
