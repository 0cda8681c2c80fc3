"""A run folder or a grid folder that names code is refused by every command, as an attacker would try it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from hpc_supcon import checkpoint, cli, parts, run_folder
from hpc_supcon.cli.app import app
from hpc_supcon.config import load_config, to_yaml
from hpc_supcon.config.code import SETTINGS

pytestmark = pytest.mark.usefixtures("own_code")
EVIL = """
from pathlib import Path
Path({marker!r}).touch()
def run(*arguments, **options):
    Path({marker!r}).touch()
"""
# A command -> its arguments, where RUN is a run folder and GRID a grid folder that name evil:run
COMMANDS = {
    ("run",): ["RUN/config.yaml"],
    ("pretrain",): ["RUN/config.yaml", "--resume"],
    ("probe",): ["RUN", "probe.kind=knn"],
    ("config",): ["RUN/config.yaml"],
    ("convert",): ["RUN", "out.beton"],
    ("verify",): ["RUN"],
    ("checkpoints",): ["RUN"],
    ("prune",): ["RUN"],
    ("embeddings",): ["RUN"],
    ("export",): ["RUN", "--format", "safetensors"],
    ("embed",): ["RUN", "image.png", "-o", "out.npz"],
    ("predict",): ["RUN", "image.png"],
    ("grid", "expand"): ["GRID/grid.yaml"],
    ("grid", "submit"): ["GRID/grid.yaml", "--cluster", "debug"],
    ("grid", "status"): ["GRID"],
    ("grid", "cancel"): ["GRID"],
    ("grid", "retry"): ["GRID", "--failed"],
    ("grid", "logs"): ["GRID", "cell"],
    ("grid", "report"): ["GRID"],
    ("report",): ["RUN"],
    ("compare",): ["RUN", "other"],
    ("track",): ["RUN"],
    ("push",): ["RUN", "--to", "out"],
    ("init",): ["RUN"],
}
WITHOUT_FOLDERS = {("bench", name) for name in ("loss", "loader", "step", "gpu")} | {("doctor",)}
VALUES = {
    "data.source": "evil:run",
    "model.encoder": "evil:run",
    "loss.name": "evil:run",
    "loss.terms": {"supcon_out": 1.0, "evil:run": 1.0},
    "augment.policy": "evil:run",
    "probe.kind": ["knn", "evil:run"],
    "log.to": ["csv", "evil:run"],
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Is made by evil.py, which lies in the current directory, in the folders, and beside them."""
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "EXECUTED"
    for folder in (".", "RUN", "GRID", "GRID/configs", "other"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "evil.py").write_text(EVIL.format(marker=str(found)))
    Path("other/config.yaml").write_text(to_yaml(load_config("quickstart")))
    return found


def write_folders(setting: str = "model.encoder") -> None:
    section, _, key = setting.partition(".")
    config = json.loads(load_config("quickstart").model_dump_json())
    config[section][key] = VALUES[setting]
    Path("RUN/config.yaml").write_text(json.dumps(config))  # JSON is YAML
    Path("GRID/grid.json").write_text(json.dumps({"format": 1, "code": ["evil:run"]}))
    Path("GRID/grid.yaml").write_text(
        json.dumps({"name": "g", "base": "quickstart", "set": {setting: VALUES[setting]}})
    )
    Path("GRID/configs/a.yaml").write_text(json.dumps(config))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (2, 1), err
    return err


def leaves(command, path=()):
    for name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, (*path, name))
    if not hasattr(command, "commands"):
        yield path


def test_no_command_is_forgotten():
    assert set(leaves(typer.main.get_command(app))) == {*COMMANDS, *WITHOUT_FOLDERS}
    assert VALUES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_folder_that_names_code(capsys, marker, command):
    write_folders()
    before = set(Path().rglob("*"))
    assert "nothing of it was imported; if you know this code and trust it, add --allow-code evil:run" in refused(
        capsys, *command, *COMMANDS[command]
    )
    # what is allowed is one name, not another one of the same module
    assert "--allow-code evil:run" in refused(capsys, *command, *COMMANDS[command], "--allow-code", "evil:other")
    assert not marker.exists()
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize("setting", VALUES)
@pytest.mark.parametrize("command", ["probe", "report", "run", "grid"])
def test_whatever_setting_names_it(capsys, marker, setting, command):
    write_folders(setting)
    arguments = {"run": ["run", "RUN/config.yaml"], "grid": ["grid", "expand", "GRID/grid.yaml"]}
    assert "--allow-code evil:run" in refused(capsys, *arguments.get(command, [command, "RUN"]))
    assert not marker.exists()


def test_escapes_hide_no_name(capsys, marker):
    write_folders()
    Path("RUN/config.yaml").write_text('model: {encoder: "evil\\x3arun"}\n')
    assert "--allow-code evil:run" in refused(capsys, "report", "RUN")
    Path("RUN/config.yaml").write_text('"mod\\u0065l":\n  encoder: "evil\\\n    :run"\n')
    assert "--allow-code evil:run" in refused(capsys, "probe", "RUN")
    assert not marker.exists()


def test_the_same_name_given_again_is_imported(capsys, marker):
    write_folders()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["checkpoints", "RUN", "--allow-code", "evil:run"])
    assert (stopped.value.code, marker.exists()) == (0, False)  # it builds nothing
    assert "imported evil" in capsys.readouterr().err + refused_more(capsys, "config", "RUN/config.yaml")
    assert marker.exists()


def refused_more(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--allow-code", "evil:run"])
    return capsys.readouterr().err


def test_a_name_that_is_no_import_path_is_unknown(capsys, marker):
    write_folders()
    for name in ("evil:", "../evil:run", "evil:run()", "evil.py", "evil", "os;evil:run", "evil :run"):
        Path("RUN/config.yaml").write_text(
            to_yaml(load_config("quickstart")).replace("encoder: conv", f"encoder: {name!r}")
        )
        assert "unknown model.encoder" in refused(capsys, "run", "RUN/config.yaml"), name
    assert not marker.exists()


def write_checkpoint(folder: Path, encoder: dict) -> None:
    """A run folder whose configuration names no code, and whose checkpoint, which verifies, does."""
    run_folder.create(folder, load_config("quickstart", [f"run_dir={folder}"]))
    state = {
        "step": 1, "encoder": encoder, "heads": ["projection"], "classes": ["a", "b"],
        "projection": {"hidden": 4, "out_dim": 4}, "normalization": {"mean": [0.5], "std": [0.5]},
    }  # fmt: skip
    checkpoint.save_checkpoint(
        folder / run_folder.CHECKPOINTS, 1, {"model": {"w": torch.zeros(1)}}, state,
        world_size=1, config_digest="", keep=2, protect=[],
    )  # fmt: skip


@pytest.mark.parametrize("encoder", [{"name": "evil:run"}, {"name": "conv", "options": {"x": 1}, "evil": "evil:run"}])
def test_a_checkpoint_that_names_code(capsys, marker, encoder):
    write_checkpoint(Path("made"), {"in_channels": 1, "image_size": 8, **encoder})
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "made", "--format", "safetensors"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "--allow-code evil:run" in err if encoder["name"] == "evil:run" else "does not fit this run's model" in err
    assert not marker.exists()


def test_a_job_of_a_grid_folder_runs_only_what_was_submitted(marker, capsys):
    """grid.json no longer says that the configurations name code; the worker's process finds out."""
    write_folders()
    Path("GRID/grid.json").write_text(json.dumps({"format": 1, "code": []}))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "GRID/configs/a.yaml", "--resume"])
    assert stopped.value.code == 2
    assert "--allow-code evil:run" in capsys.readouterr().err
    assert not marker.exists()


def test_in_a_process_of_its_own_with_the_folder_as_the_current_directory(marker, monkeypatch):
    write_folders()
    monkeypatch.chdir("RUN")
    for name in ("evil:run", "os:system"):
        Path("config.yaml").write_text(Path("config.yaml").read_text().replace("evil:run", name))
        program = "import sys; from hpc_supcon.cli import main; main(sys.argv[1:])"
        environment = {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "PATH": "/usr/bin"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, "probe", "."]
            if sys.version_info >= (3, 11)
            else [sys.executable, "-c", program, "probe", "."],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 2
        assert f"--allow-code {name}" in done.stderr
    assert not marker.exists()


def test_every_command_says_what_the_option_is_for(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert "--allow-code" in capsys.readouterr().out
    assert parts.allowed() == []
