"""Old names work until the version that was promised; whoever uses one is told so once, as CONTRIBUTING.md says."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import hpc_supcon as hs
from hpc_supcon import cli, old_names, renamed
from hpc_supcon.config import load_config
from hpc_supcon.environment import RANK_VARIABLES

GREY = "augment.grey is now called augment.grayscale; version 0.3.0 will no longer read the old name"
MLP = "probe.mlp.optimiser is now called probe.mlp.optimizer; version 0.3.0 will no longer read the old name"


@pytest.fixture(autouse=True)
def _told_nothing(monkeypatch):
    monkeypatch.setattr(old_names, "_told", set())
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def command(capsys, *arguments):
    """(stdout, lines of stderr) of a command that succeeds."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert not ended.value.code
    found = capsys.readouterr()
    return found.out, found.err.splitlines()


@pytest.mark.parametrize("old", [*renamed.SETTINGS, *renamed.NAMES])
def test_a_name_whose_time_is_over_is_no_longer_there(old):
    gone_in = (renamed.SETTINGS | renamed.NAMES)[old].gone_in
    assert numbers(hs.__version__) < numbers(gone_in), (
        f"{old} was promised until {gone_in}: take it out of renamed.py"
    )
    assert numbers(gone_in)[2] == 0, "names go with a minor release"
    assert len(numbers(gone_in)) == 3


def test_a_setting_on_the_command_line_is_one_line_on_stderr(capsys):
    out, lines = command(capsys, "config", "default", "augment.grey=0.25")
    assert "grayscale: 0.25" in out
    assert lines == [f"override 'augment.grey=0.25': {GREY}"]
    assert command(capsys, "config", "default", "augment.grayscale=0.25") == (out, [])


def test_a_recipe_and_its_base_are_named_and_each_name_is_told_once(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("augment: {grey: 0.1}\nprobe: {mlp: {optimiser: sgd}}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\naugment: {grey: 0.2}\n")
    out, lines = command(capsys, "config", str(tmp_path / "mine.yaml"), "augment.grey=0.3")
    assert "grayscale: 0.3" in out
    base = tmp_path / "base.yaml"
    assert lines == [f"{base}: {GREY}", f"{base}: {MLP}"]
    _, again = command(capsys, "config", str(tmp_path / "mine.yaml"))
    assert len(again) == 2, "the next command says it again"


def test_a_grid_s_axis_may_have_an_old_name_and_is_told_once(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("name: g\nbase: quickstart\nseeds: 2\naxes: {augment.grey: [0.1, 0.2]}\n")
    out, lines = command(capsys, "grid", "expand", str(grid))
    assert "4 cells" in out
    assert lines == [f"grid 'g': axis 'augment.grey', value '0.1': {GREY}"]


def test_python_warns_at_the_line_of_the_user_once_for_each_name():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        shown = hs.views(settings={"augment.grey": 0.3, "probe.mlp.optimiser": "sgd"}, images=1)
        hs.views(settings={"augment": {"grey": 0.3}}, images=1)
    assert {warning.category for warning in found} == {DeprecationWarning}
    assert [str(warning.message).partition(": ")[2] for warning in found] == [GREY, MLP]
    assert {warning.filename for warning in found} == {__file__}
    assert shown.shape[0] == 1


def test_a_script_shows_the_warning_by_default():
    code = "from hpc_supcon.config import load_config\nload_config('default', ['augment.grey=0.2'])\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(hs.__file__).parents[1])}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
    assert done.stderr.startswith(f"<string>:2: DeprecationWarning: override 'augment.grey=0.2': {GREY}")


@pytest.mark.parametrize("rank", [("RANK", "1"), ("SLURM_PROCID", "3")])
def test_other_ranks_read_it_and_say_nothing(rank, monkeypatch, capsys):
    monkeypatch.setenv(*rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config("default", ["augment.grey=0.3"]).augment.grayscale == 0.3
    with old_names.printed(print):
        load_config("default", ["augment.grey=0.3"])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(rank[0], "0")
    with pytest.warns(DeprecationWarning, match="grayscale"):
        load_config("default", ["augment.grey=0.3"])


def test_an_error_in_its_value_has_the_new_name():
    with old_names.printed(lambda line: None), pytest.raises(hs.HpcSupconError, match=r"augment\.grayscale"):
        load_config("default", ["augment.grey=much"])


def test_an_old_public_name_is_the_new_one_and_warns(monkeypatch):
    monkeypatch.setitem(renamed.NAMES, "fit", renamed.Renamed("pretrain", "9.0.0"))
    told = "hpc_supcon.fit is now called hpc_supcon.pretrain; version 9.0.0 will no longer read the old name"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert hs.fit is hs.pretrain
        assert hs.fit is hs.pretrain
    assert found[0].category is DeprecationWarning
    assert [str(warning.message) for warning in found] == [f"import hpc_supcon: {told}"]
    assert found[0].filename == __file__
    assert "fit" not in dir(hs), "what is to go is not offered"


def test_old_names_of_python_have_new_ones_that_exist():
    assert all(new.new in hs.__all__ for new in renamed.NAMES.values())
