"""A run folder that version 0.1 made, of an interrupted run, is read with the names of today."""

from __future__ import annotations

import json
import re
import tarfile
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hpc_supcon import cli, old_names, renamed
from hpc_supcon.config import load_config
from hpc_supcon.errors import ConfigError
from hpc_supcon.run_folder import read_config

ARCHIVE = Path(__file__).parents[1] / "data" / "run-folder-of-0.1.tar.xz"


@pytest.fixture(autouse=True)
def _told_nothing(monkeypatch):
    monkeypatch.setattr(old_names, "_told", set())


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        has_filters = hasattr(tarfile, "data_filter")  # not in every 3.10 and 3.11
        archive.extractall(tmp_path, **({"filter": "data"} if has_filters else {}))
    return tmp_path / "run"


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code or 0


def test_its_settings_have_their_new_names(folder):
    text = (folder / "config.yaml").read_text()
    for old in ("grey: 0.3", "standardise: true", "optimiser: adam"):
        assert old in text
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        config = read_config(folder)
        read_config(folder)
    told = [str(warning.message) for warning in found]
    assert len(told) == len(set(told)) >= 3
    assert any("config.yaml: augment.grey is now called augment.grayscale; version 0.3.0" in line for line in told)
    assert config.augment.grayscale == 0.3
    assert config.probe.linear.optimizer == "adam"
    assert config.probe.linear.standardize


def test_an_old_name_beside_its_new_one_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("augment: {grey: 0.1, grayscale: 0.2}\n")
    with pytest.raises(ConfigError, match=r"augment\.grey is the old name of augment\.grayscale"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("old", renamed.SETTINGS)
def test_every_old_name_stands_for_a_setting_that_exists(old):
    section, _, _ = old.rpartition(".")
    value = load_config()
    for part in (*section.split("."), renamed.SETTINGS[old].new):
        value = getattr(value, part)
    text = json.dumps(value)
    with pytest.warns(DeprecationWarning, match=re.escape(old)):
        new = load_config("default", [f"{old}={text}"])
    assert new == load_config("default", [f"{section}.{renamed.SETTINGS[old].new}={text}"])


def test_it_is_exported_and_probed_and_resumes_and_is_pruned(folder, tmp_path, capsys):
    ours, out = f"run_dir={folder}", tmp_path / "classifier.safetensors"
    assert run("export", folder, "--part", "classifier", "--format", "safetensors", "-o", out) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "is now called" in line]
    assert len(told) == len(set(told)) >= 3
    assert all(line.startswith(f"{folder / 'config.yaml'}: ") and "version 0.3.0" in line for line in told)
    assert load_file(out)
    assert run("probe", folder, ours) == 0
    assert run("pretrain", folder / "config.yaml", ours, "--resume") == 0
    said = "saved by an earlier version without a record of its data; whether they changed is unknown\n"
    assert capsys.readouterr().err.count(said) == 1
    assert (folder / "checkpoints" / "step-12" / "manifest.json").is_file()
    state = json.loads((folder / "checkpoints" / "step-12" / "state.json").read_text())
    assert state["last_validated_step"] == 12
    assert not set(renamed.STATE) & set(state)
    assert run("prune", folder, ours, "prune.rate=0.5") == 0
    results = json.loads((folder / "results.json").read_text())["results"]
    assert {r["stage"] for r in results} == {"probe", "prune"}
