"""Runs with parts of a user's own: a plug-in that pip installed, and modules of the current directory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.own_code import install, main, run
from tests.processes import Ranks

TESTS = Path(__file__).parents[2]
SMALL = [
    "train.epochs=2", "data.batch_size=24", "checkpoint.every_epochs=1", "report.embeddings=false",
    "report.html=false", "probe.embedding=false",
]  # fmt: skip
PLUGIN = [
    "data.source=plugin_shapes", "data.options.size=10", "model.encoder=plugin_tiny", "model.options={width: 6}",
    "loss.name=plugin_nca", "loss.options.temperature=0.3", "augment.policy=plugin_darken",
    "probe.kind=[plugin_means, knn]", "log.to=[csv, plugin_lines]",
]  # fmt: skip
OWN = ["own_mine:Tiny", "own_mine:ProxyLoss", "own_mine:Erase", "own_mine:Means"]
MINE = [
    "model.encoder=own_mine:Tiny", "loss.name=own_mine:ProxyLoss", "loss.options={proxies: 10, dim: 64}",
    "augment.policy=own_mine:Erase", "probe.kind=[knn, own_mine:Means]", "data.train_images=120",
]  # fmt: skip


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder into which pip has installed tests/plugin, without a network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    return install(TESTS / "plugin", folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plugin_that_pip_installed_trains_and_is_probed(site, tmp_path, ranks):
    code, err = run(tmp_path, "run", "quickstart", *SMALL, *PLUGIN, "run_dir=r", ranks=ranks, site=site)
    assert code == 0, err
    assert err.count("imported own_plugin") == 6
    folder = tmp_path / "r"
    results = json.loads((folder / "results.json").read_text())["results"]
    assert [(r["probe"], r["encoder"], r["loss"]) for r in results] == [
        ("plugin_means", "plugin_tiny", "plugin_nca"), ("knn", "plugin_tiny", "plugin_nca"),
    ]  # fmt: skip
    assert results[0]["test"]["accuracy"] > 0.6
    assert (folder / "lines.txt").read_text().startswith("start 0\n")
    frozen = json.loads((folder / "parts.json").read_text())
    digest = hashlib.sha256((TESTS / "plugin/own_plugin.py").read_bytes()).hexdigest()
    assert set(frozen) == {
        "sources plugin_shapes", "encoders plugin_tiny", "losses plugin_nca", "policies plugin_darken",
    }  # fmt: skip
    assert {(p["module"], p["version"], p["sha256"]) for p in frozen.values()} == {
        ("own_plugin", "own-plugin 0.1", digest)
    }
    # registered names need no allowance, but the package has to be there
    code, err = run(tmp_path, "probe", "r", "probe.kind=plugin_means", site=site, ranks=ranks)
    assert code == 0, err
    code, err = run(tmp_path, "probe", "r")
    assert code == 2
    assert "unknown data.source 'plugin_shapes'" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with own_mine.py, and with a run of its parts in r."""
    here = tmp_path_factory.mktemp("own")
    (here / "own_mine.py").write_bytes((TESTS / "own_parts.py").read_bytes())
    code, err = run(here, "run", "quickstart", *SMALL, *MINE, "run_dir=r")
    assert code == 0, err
    return here


ALLOWED = [text for name in OWN for text in ("--allow-code", name)]


def test_a_run_with_own_code_is_read_only_where_that_is_allowed_again(trained):
    for command in (["probe", "r"], ["export", "r", "--format", "safetensors"], ["report", "r"], ["prune", "r"]):
        code, err = run(trained, *command)
        assert code == 2, err
        assert all(f"--allow-code {name}" in err for name in OWN)
        assert "imported own_mine" not in err
    code, err = run(trained, "probe", "r", *ALLOWED)
    assert code == 0, err
    code, err = run(trained, "export", "r", "--format", "safetensors", *ALLOWED)
    assert code == 0, err
    assert (trained / "supcon-encoder.safetensors").exists() or list(trained.glob("*-encoder.safetensors"))
    names = [r["probe"] for r in json.loads((trained / "r/results.json").read_text())["results"]]
    assert sorted(names) == ["knn", "own_mine.Means"]


def test_a_run_is_not_resumed_with_other_code_unless_that_is_asked_for(trained):
    resume = ["pretrain", "quickstart", *SMALL, *MINE, "run_dir=r", "--resume"]
    code, err = run(trained, *resume)
    assert code == 0, err
    module, frozen = trained / "own_mine.py", (trained / "r/parts.json").read_text()
    module.write_text(module.read_text() + "# changed\n")
    code, err = run(trained, *resume)
    assert code == 2
    assert "r: the code is not that which the run was started with: encoders own_mine:Tiny: " in err
    assert f"{module} was changed (sha256 " in err
    assert "go on with train.allow_code_change=true" in err
    assert (trained / "r/parts.json").read_text() == frozen
    code, err = run(trained, *resume, "train.allow_code_change=true")
    assert code == 0, err
    assert "going on with other code" in err
    code, err = run(trained, *resume)
    assert code == 0, err


def test_ranks_with_other_code_are_told(tmp_path):
    """The file changes between the imports of two ranks: each has a folder of its own."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        text = (TESTS / "own_parts.py").read_text()
        (tmp_path / str(rank) / "own_mine.py").write_text(text + f"# {rank}\n")
    arguments = ["run", "quickstart", *SMALL, "model.encoder=own_mine:Tiny", f"run_dir={tmp_path / 'r'}"]
    ended = Ranks(arguments, tmp_path / "stderr", 2, environment={"HERE": tmp_path}, main=in_a_folder_of_its_own)
    assert set(ended.end()) == {2}
    assert "code of encoders own_mine:Tiny" in ended.stderr


def in_a_folder_of_its_own() -> None:
    os.environ["HERE"] += f"/{os.environ['RANK']}"
    main()


GRID = """
name: own
base: quickstart
set:
  model.encoder: own_mine:Tiny
  train.epochs: 1
  data.train_images: 100
  data.batch_size: 20
  probe.kind: knn
  report.embeddings: false
  report.html: false
axes: {model.options: {narrow: {model.options: {width: 4}}}}
"""


def test_a_grid_runs_the_code_that_was_submitted_and_its_folder_needs_it_again(trained):
    (trained / "own.yaml").write_text(GRID)
    code, err = run(trained, "grid", "submit", "own.yaml", "--cluster", "debug")
    assert code == 0, err
    records = [json.loads(path.read_text()) for path in (trained / "grids/own/records").glob("*.json")]
    assert [record["outcome"] for record in records] == ["done"] * 2, records
    assert json.loads((trained / "grids/own/grid.json").read_text())["code"] == ["own_mine:Tiny"]
    for command in ("status", "report"):
        code, err = run(trained, "grid", command, "grids/own")
        assert code == 2, err
        assert "grids/own/grid.json: names code to be executed, own_mine:Tiny" in err
    code, err = run(trained, "grid", "status", "grids/own", "--allow-code", "own_mine:Tiny")
    assert code == 0, err
