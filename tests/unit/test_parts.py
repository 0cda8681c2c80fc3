"""Parts of a user's own: which names lead to code, how they are checked, and what is never imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpc_supcon import parts
from hpc_supcon.config import load_config
from hpc_supcon.config.code import given, import_paths
from hpc_supcon.errors import CodeNotAllowed, ConfigError, PartError

pytestmark = pytest.mark.usefixtures("own_code")
MODULE = """
    from pathlib import Path
    Path({marker!r}).touch()
    class Loss:
        def __init__(self, margin=0.5, *, scale: float): ...
    def encoder(in_channels, image_size, out_dim, width=8): ...
    def without(image_size, out_dim): ...
    def anything(**options): ...
    number = 3
"""


def write_module(folder: Path, name: str) -> Path:
    """A module that leaves a file MARKER when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "MARKER"
    text = MODULE.format(marker=str(marker)).replace("\n    ", "\n")
    (folder / f"{name}.py").write_text(text)
    return marker


def install(site: Path, name: str, group: str, entries: dict[str, str]) -> Path:
    """A package as pip leaves it: its module, and metadata that register names; returns the module's marker."""
    marker = write_module(site, name.replace("-", "_"))
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "top_level.txt").write_text(name.replace("-", "_"))
    lines = [f"[hpc_supcon.{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return marker


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*overrides: str) -> str:
    with pytest.raises((ConfigError, CodeNotAllowed)) as error:
        load_config("quickstart", list(overrides), stages=("pretrain", "probe"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_import_path_that_nobody_allowed_is_never_imported(here):
    marker = write_module(here, "own_a")
    sys.path.append(str(here))
    for kind in parts.KINDS:
        with pytest.raises(CodeNotAllowed, match="add --allow-code own_a:Loss"):
            parts.find(kind, "own_a:Loss")
    assert not marker.exists()
    assert "own_a" not in sys.modules


def test_allowing_one_name_allows_no_other_of_its_module(here):
    write_module(here, "own_b")
    parts.allow(["own_b:Loss"], "a test")
    assert parts.find("losses", "own_b:Loss").call.__name__ == "Loss"
    with pytest.raises(CodeNotAllowed):
        parts.find("losses", "own_b:anything")


def test_overrides_and_recipes_by_path_allow_what_they_name(here):
    write_module(here, "own_c")
    config = load_config("quickstart", ["loss.name=own_c:Loss", "loss.options.scale=2"], stages=("pretrain",))
    assert config.loss.options == {"scale": 2}
    (here / "mine.yaml").write_text("base: quickstart\nmodel: {encoder: own_c:encoder, options: {width: 3}}\n")
    assert load_config("mine.yaml", stages=("pretrain",)).model.encoder == "own_c:encoder"
    assert parts.allowed() == ["own_c:Loss", "own_c:encoder"]


@pytest.mark.parametrize("name", ["config.yaml", "grid/configs/a.yaml", "grid/grid.yaml", "link.yaml"])
def test_the_files_of_folders_allow_nothing(here, name):
    marker = write_module(here, "own_d")
    for folder in ("grid/configs", "other"):
        (here / folder).mkdir(parents=True)
    (here / "grid/grid.json").write_text("{}")
    text = "model: {encoder: own_d:encoder}\n"
    if name == "link.yaml":  # that stands for a run folder's file
        (here / "other/config.yaml").write_text(text)
        (here / name).symlink_to(here / "other/config.yaml")
    else:
        (here / name).write_text(text)
    with pytest.raises(CodeNotAllowed, match="own_d:encoder"):
        load_config(Path(name), stages=("pretrain",))
    (here / "recipe.yaml").write_text(f"base: ./{name}\n")
    with pytest.raises(CodeNotAllowed, match="own_d:encoder"):
        load_config("recipe.yaml")
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"encoder": "a.b:C"}},
        {"model.encoder": ["resnet18", "a.b:C"]},
        {"axes": {"x": {"label": {"loss.terms": {"a.b:C": 1.0}}}}},
        {"include": [{"probe.kind": ["knn", "a.b:C"]}]},
        {"log": {"to": ["csv", "a.b:C"]}},
        {"set": {"augment.policy": "a.b:C"}, "data": {"root": "x:y"}},
    ],
)
def test_import_paths_are_found_in_settings_of_every_form(settings):
    assert set(import_paths(settings)) == {"a.b:C"}
    given(settings, "a test")
    assert parts.allowed() == ["a.b:C"]


def test_what_is_wrong_with_a_part_is_told_in_a_line_with_origin_and_remedy(here):
    write_module(here, "own_e")
    (here / "own_broken.py").write_text("import nothing_of_this_name\n")
    (here / "own_exit.py").write_text("raise SystemExit(3)\n")
    for overrides, said in [
        (["loss.name=own_missing:Loss"], "override 'loss.name=own_missing:Loss': loss.name=own_missing:Loss: "
         "own_missing cannot be imported: ModuleNotFoundError"),
        (["loss.name=own_broken:Loss"], "No module named 'nothing_of_this_name'"),
        (["loss.name=own_exit:Loss"], "SystemExit: 3"),
        (["loss.name=own_e:Los", "loss.options.scale=1"], "unknown name in own_e 'Los'; did you mean 'Loss'"),
        (["loss.name=own_e:number"], "is of type int, not a class or a function"),
        (["loss.name=own_e:Loss", "loss.options={scale: 1, marginn: 1}"], "unknown option of own_e:Loss 'marginn'; "
         "did you mean 'margin'?"),
        (["loss.name=own_e:Loss"], "missing a required argument: 'scale'; give it in loss.options"),
        (["model.encoder=own_e:without"], "takes no argument 'in_channels', but is called with in_channels, image"),
        (["model.encoder=own_e:encoder", "model.options={out_dim: 3}"], "model.options.out_dim: own_e:encoder is "
         "given its out_dim by other settings"),
        (["loss.options={margin: 1}"], "loss.options is for a part of your own, but loss.name=supcon_out is one of "
         "hpc_supcon"),
        (["model.options={width: 1}"], "model.options is for a part of your own, but model.encoder=conv"),
        (["model.encoder=own_e::x"], "unknown model.encoder 'own_e::x'"),
        (["data.source=own-e:x"], "unknown data.source 'own-e:x'"),
        (["loss.terms={own_e:anything: 1, own_e:Loss: 1}", "loss.options={scale: 1}"], "with several parts of one's "
         "own, give {NAME: {option: value}}"),
        (["model.encoder=own_e:encoder", "model.stem=small"], "has only its own stem"),
    ]:  # fmt: skip
        assert said in refused(*overrides), overrides


def test_hostile_keys_of_options_are_arguments_and_nothing_else(here):
    write_module(here, "own_f")
    keys = ["self", "__class__", "__init__", "in_channels", "margin=1", "*", "**", ""]
    for key in keys:
        message = refused("loss.name=own_f:Loss", f"loss.options={{scale: 1, {key!r}: 1}}")
        assert "unknown option" in message or "missing" in message
    # what takes any option is given any, as a keyword
    load_config("quickstart", ["loss.name=own_f:anything", "loss.options={__class__: 1}"], stages=("pretrain",))


def test_a_file_of_the_name_of_an_installed_module_is_refused(here):
    marker = write_module(here, "statistics")
    assert "has the name of an installed module" in refused("loss.name=statistics:mean")
    assert not marker.exists()


def test_the_current_directory_comes_after_everything_installed(here):
    write_module(here, "own_g")
    marker = write_module(here, "colorsys")  # of Python itself, not imported yet
    sys.modules.pop("colorsys", None)
    load_config("quickstart", ["loss.name=own_g:anything"], stages=("pretrain",))
    assert str(here) == sys.path[-1]
    marker.unlink()  # of own_g
    import colorsys

    assert not marker.exists()
    assert Path(colorsys.__file__).parent != here


def test_a_registered_name_needs_no_allowance(tmp_path, here):
    site = tmp_path / "site"
    marker = install(site, "own-plugin", "losses", {"ours": "own_plugin:Loss"})
    sys.path.append(str(site))
    config = load_config("quickstart", ["loss.name=ours", "loss.options={scale: 1}"])
    assert not marker.exists()  # nothing is imported before it is used
    assert "unknown option of ours 'skale'; did you mean 'scale'?" in refused(
        "loss.name=ours", "loss.options={skale: 1}"
    )
    part = parts.find("losses", config.loss.name)
    assert (part.module, part.version) == ("own_plugin", "own-plugin 1.2")
    assert "did you mean 'ours'" in refused("loss.name=oursx")


@pytest.mark.parametrize(
    ("kind", "name", "setting"),
    [
        ("encoders", "conv", "model.encoder"),
        ("encoders", "resnet18", "model.encoder"),
        ("losses", "supcon_out", "loss.name"),
        ("policies", "simaugment", "augment.policy"),
        ("probes", "linear", "probe.kind"),
        ("sources", "digits", "data.source"),
        ("loggers", "csv", "log.to"),
    ],
)
def test_a_registered_name_may_not_be_that_of_a_part_of_this_package(tmp_path, here, kind, name, setting):
    site = tmp_path / "site"
    marker = install(site, "own-shadow", kind, {name: "own_shadow:anything"})
    sys.path.append(str(site))
    message = refused(f"{setting}={name}")
    assert (
        f"the package own-shadow registers that name, which hpc_supcon has itself (entry point hpc_supcon.{kind})"
        in message
    )
    assert not marker.exists()


def test_a_name_that_two_packages_register_is_refused(tmp_path, here):
    site = tmp_path / "site"
    for package in ("own-one", "own-two"):
        marker = install(site, package, "losses", {"ours": f"{package.replace('-', '_')}:anything"})
    sys.path.append(str(site))
    assert "own-one and the package own-two register that name both" in refused("loss.name=ours")
    assert not marker.exists()


@pytest.mark.parametrize("entry", ["", "."], ids=["python -m", "a relative path"])
def test_metadata_in_the_current_directory_registers_nothing(here, entry):
    marker = install(here, "own-here", "losses", {"ours": "own_here:anything"})
    sys.path.insert(0, entry)
    assert "unknown loss.name 'ours'" in refused("loss.name=ours")
    assert not marker.exists()


def test_what_a_part_raises_is_one_line_with_its_place(here):
    (here / "own_raises.py").write_text("def encoder(**_):\n    raise ValueError('no\\nway')\n")
    parts.allow(["own_raises:encoder"], "a test")
    part = parts.find("encoders", "own_raises:encoder")
    with pytest.raises(
        PartError, match=r"^model.encoder=own_raises:encoder: failed: ValueError: no \(own_raises.py, line 2\)"
    ):
        part.build({}, in_channels=1, image_size=8, out_dim=None)
