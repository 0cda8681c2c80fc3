"""What `make dist` builds, and that it works where there is nothing but it."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

from hpc_supcon import __version__

from .conftest import ROOT, call

NAME = f"hpc_supcon-{__version__}"


def package_files(folder: Path) -> set[str]:
    return set(call("git", "-C", folder, "ls-files", "hpc_supcon").split())


@pytest.fixture
def wheel(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as file:
        yield file


def metadata(wheel) -> dict[str, list[str]]:
    message = HeaderParser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    return {key: message.get_all(key) for key in message}


def test_the_wheel_has_every_file_of_the_package_and_no_others(checkout, wheel):
    names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    expected = package_files(checkout)
    assert {"hpc_supcon/py.typed", "hpc_supcon/config/recipes/default.yaml"} < expected
    assert names == expected | {"hpc_supcon/COMMIT"}
    assert f"{NAME}.dist-info/licenses/LICENSE" in wheel.namelist()


def test_the_source_archive_has_what_builds_the_wheel_and_no_more(checkout, built):
    with tarfile.open(built / f"{NAME}.tar.gz") as file:
        names = {member.name.removeprefix(f"{NAME}/") for member in file.getmembers() if member.isfile()}
    about = {"setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "hpc_supcon/COMMIT"}
    assert {name for name in names if ".egg-info/" not in name} == package_files(checkout) | about
    assert sorted(path.name for path in built.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]


def test_the_metadata_is_that_of_setup_cfg(wheel):
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    found = metadata(wheel)
    assert found["Version"] == [__version__]
    assert found["Requires-Python"] == [setup["options"]["python_requires"]]
    assert set(found["Provides-Extra"]) == set(setup["options.extras_require"])
    needed = [text for text in found["Requires-Dist"] if "extra ==" not in text]
    assert needed == setup["options"]["install_requires"].split()


def test_what_is_built_says_of_which_commit_it_is(checkout, wheel, installed):
    commit = call("git", "-C", checkout, "rev-parse", "HEAD").strip()
    assert wheel.read("hpc_supcon/COMMIT").decode() == f"{commit}\n"
    assert installed.call("hpc-supcon", "--version") == f"hpc-supcon {__version__} ({commit})\n"
    assert f"{__version__} {commit}" in " ".join(installed.call("hpc-supcon", "doctor").split())


def test_what_is_imported_is_the_wheel(installed):
    path = installed.call("python", "-c", "import hpc_supcon; print(hpc_supcon.__file__)")
    assert Path(path).is_relative_to(installed.bin.parent / "lib")


SATISFIED = """
from importlib.metadata import requires, version
from packaging.requirements import Requirement
for requirement in map(Requirement, requires("hpc-supcon")):
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        print(requirement.name, requirement.specifier.contains(version(requirement.name), prereleases=True))
"""


def test_every_requirement_is_met_by_what_these_tests_use(wheel, installed):
    found = dict(line.split() for line in installed.call("python", "-c", SATISFIED).splitlines())
    assert len(found) == len([text for text in metadata(wheel)["Requires-Dist"] if "extra ==" not in text])
    assert set(found.values()) == {"True"}, found


@pytest.mark.timeout(1800)  # on a machine that others use; it takes one core for less than a minute
def test_the_quickstart_of_the_wheel_trains_and_evaluates(installed):
    """A third of its epochs, in one process."""
    printed = installed.call("hpc-supcon", "run", "quickstart", "run_dir=runs/first", "train.epochs=20")
    assert [path.name for path in installed.here.iterdir()] == ["runs"]
    [entry] = json.loads((installed.here / "runs/first/results.json").read_text())["results"]
    scores = entry["test"]
    shown = re.search(r"linear . test +. ([\d.]+) ", printed)
    assert shown is not None, printed
    assert float(shown[1]) == pytest.approx(scores["accuracy"], abs=5e-5)
    assert scores["accuracy"] > 0.8
    start = json.loads((installed.here / "runs/first/metrics.jsonl").read_text().splitlines()[0])
    assert f"({start['commit']})" in installed.call("hpc-supcon", "--version")
    page = installed.here / "runs/first/report.html"
    first = page.read_text()
    installed.call("hpc-supcon", "report", "runs/first", "-o", "again.html")
    assert len((installed.here / "again.html").read_text()) > 0.5 * len(first) > 100_000


def test_a_grid_of_the_wheel_expands(installed):
    grid = {"name": "g", "base": "quickstart", "axes": {"loss.temperature": [0.1, 0.5]}}
    (installed.here / "grid.yaml").write_text(json.dumps(grid))  # YAML, too
    assert "2 cells, 2 pretrain, 2 probe" in installed.call("hpc-supcon", "grid", "expand", "grid.yaml")
