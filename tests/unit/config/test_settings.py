"""Which settings may differ: between ranks, and between a run and its resumption."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc_supcon.config import MAY_DIFFER, differences, flatten, load_config, shared_settings

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "ranks.md"


def test_what_may_differ_between_ranks_exists_and_is_in_the_readme():
    assert set(MAY_DIFFER) <= set(flatten(load_config()))
    table = GUIDE.read_text().partition("What may differ between ranks:")[2].partition("\n\nThe run folder")[0]
    assert set(re.findall(r"`([a-z_]+\.[a-z_]+)`", table)) == set(MAY_DIFFER)


def test_all_other_settings_are_compared_and_of_paths_whether_they_are_given():
    config = load_config("default", ["data.root=/a", "run_dir=r"])
    shared = shared_settings(config)
    assert set(flatten(config)) - set(shared) == {"data.download", "data.workers", "runtime.threads"}
    assert shared == shared_settings(load_config("default", ["data.root=/b", "run_dir=r"]))
    assert shared != shared_settings(load_config("default", ["run_dir=r"]))


def test_a_run_folder_counts_by_its_whole_path(tmp_path, monkeypatch):
    config = load_config("default", ["run_dir=r"])
    here = shared_settings(config)["run_dir"]
    monkeypatch.chdir(tmp_path)
    assert (here, shared_settings(config)["run_dir"]) == (str(Path(here)), str(tmp_path / "r"))
    assert here != str(tmp_path / "r")


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [("a.beton", "b/a.beton", False), ("null", "a.beton", True), ("a.beton", "null", True)],
)
def test_beton_files_may_move_but_not_take_the_place_of_images(before, after, differs):
    old, new = (load_config("default", [f"data.beton={path}"]) for path in (before, after))
    assert bool(differences(old, new)) is differs
