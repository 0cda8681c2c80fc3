"""tests/tidy.py finds what it is for, and has no exception that is not needed."""

from __future__ import annotations

import fnmatch

import pytest

from tests import tidy

vulture = pytest.importorskip("vulture", reason="tools for developers")

SETUP = """
[options]
install_requires =
    numpy>=1.26
    {more}
[options.extras_require]
wandb =
    wandb>=0.22
dev =
    pytest>=8.3
"""
USED = """
import numpy as np


def half(values):
    import wandb

    found = np.asarray(values)
    wandb.log({"n": found.size, "mean": float(found.mean()), "sd": float(found.std())})
    if found.ndim != 1:
        raise ValueError("expected one dimension")
    order = np.argsort(found, kind="stable")
    if len(order) % 2:
        order = np.append(order, order[-1])
    return found[order[: len(order) // 2]], found[order[len(order) // 2 :]]
"""
PROJECT = {
    "setup.cfg": SETUP.format(more=""),
    "pkg/__init__.py": "",
    "pkg/halves.py": USED,
    "pkg/__main__.py": "from .halves import half\n\nprint(half([1, 2]))\n",
    "tests/test_halves.py": "import pytest\n\nfrom pkg.halves import half\n\nassert half([1, 2])\npytest.skip()\n",
    "examples/first.py": "from pkg.halves import half\n\nprint(half([1, 2]))\n",
}
DEAD = "code of the package that the package does not use"
UNUSED, DEPENDENCIES, TWICE = "code that nothing uses", "dependencies", "code that is written twice"
# what is wrong: (files, heading -> part of what is said)
WRONG = {
    "a dead function": (
        {"pkg/more.py": "def double(x):\n    return 2 * x\n"},
        {DEAD: "unused function 'double'", UNUSED: "unused function 'double'"},
    ),
    "a function for its test alone": (
        {
            "pkg/more.py": "def double(x):\n    return 2 * x\n",
            "tests/test_more.py": "from pkg.more import double\n\nassert double(1) == 2\n",
        },
        {DEAD: "unused function 'double'"},
    ),
    "a dead helper of tests": ({"tests/helpers.py": "def double(x):\n    return 2 * x\n"}, {UNUSED: "'double'"}),
    "an unused dependency": (
        {"setup.cfg": SETUP.format(more="scipy>=1.11")},
        {DEPENDENCIES: "'scipy' defined as a dependency but not used"},
    ),
    "a dependency of dependencies": (
        {"pkg/__init__.py": "import yaml\n\nprint(yaml)\n"},
        {DEPENDENCIES: "'yaml' imported but it is a transitive dependency"},
    ),
    "an undeclared dependency": (
        {"pkg/__init__.py": "import no_such_package\n\nprint(no_such_package)\n"},
        {DEPENDENCIES: "'no_such_package' imported but missing"},
    ),
    "an undeclared dependency of a test": (
        {"tests/test_more.py": "import no_such_package\n\nprint(no_such_package)\n"},
        {DEPENDENCIES: "'no_such_package' imported but missing"},
    ),
    "a dependency for developers in the package": (
        {"pkg/__init__.py": "import pytest\n\nprint(pytest)\n"},
        {DEPENDENCIES: "'pytest' imported but declared as a dev dependency"},
    ),
    "a copy": ({"tests/test_copy.py": USED + "\n\nassert half([1, 2])\n"}, {TWICE: "Clone found (python)"}),
    "a copy with other names": (
        {
            "pkg/halves.py": USED.replace("found", "rows").replace("order", "places"),
            "pkg/__init__.py": USED + "\n\nprint(half([1, 2]))\n",
        },
        {TWICE: "Clone found (python, renamed)"},
    ),
}


def findings(root, files):
    for name, text in (PROJECT | files).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return tidy.findings(root, "pkg", ("tests", "examples"))


def test_a_tidy_project_passes(tmp_path):
    assert findings(tmp_path, {}) == {}


@pytest.mark.parametrize("what", WRONG)
def test_each_is_found(tmp_path, what):
    files, expected = WRONG[what]
    found = findings(tmp_path, files)
    assert found.keys() == expected.keys(), found
    for heading, part in expected.items():
        assert part in found[heading]


def test_every_exception_is_needed():
    for names, folders in (
        (tidy.NAMES, (tidy.PACKAGE,)),
        (tidy.NAMES_OF_OTHERS, (tidy.PACKAGE, *tidy.OTHERS[:-1])),
    ):
        finder = vulture.Vulture(ignore_decorators=list(tidy.DECORATORS))
        finder.scavenge([str(tidy.ROOT / folder) for folder in folders])
        unused = {item.name for item in finder.get_unused_code()}
        assert {name for name in names if not fnmatch.filter(unused, name)} == set()
