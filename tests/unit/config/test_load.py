"""The configuration: what is written is what is meant, and every mistake is one clear line."""

from __future__ import annotations

import contextlib
import json
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_supcon import config as cfg
from hpc_supcon.config import yaml12
from hpc_supcon.config.schema import Config
from hpc_supcon.errors import ConfigError


def test_default_yaml_is_complete_and_the_resolved_config_reads_back_equal():
    config = cfg.load_config()
    assert yaml12.loads(cfg.to_yaml(config), "x") == config.model_dump(mode="json")
    assert Config.model_validate_json(json.dumps(yaml12.loads(cfg.to_yaml(config), "x"))) == config


@pytest.mark.parametrize("name", ["quickstart", "mnist", "cifar10-folder"])
def test_our_own_recipes_state_only_differences(name):  # published ones state what was published
    path = resources.files("hpc_supcon.config") / "recipes" / f"{name}.yaml"
    stated = cfg.flatten_data(yaml12.loads(path.read_text(), name))
    default = cfg.flatten(cfg.load_config(name))
    assert {k: default[k] for k in stated} == stated
    default = cfg.flatten(cfg.load_config())
    assert 1 < len(path.read_text().splitlines()) <= 25
    same = {k for k, v in stated.items() if default[k] == v} - {"data.source"}
    assert not same, f"{name} repeats the default of {same}"


def test_a_recipe_file_is_merged_over_the_default_and_overrides_over_both(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.25}\ntrain:\n  epochs: 7\n")
    config = cfg.load_config(path, ["train.epochs=9"])
    assert (config.optim.lr, config.train.epochs, config.data.views) == (0.25, 9, 2)
    assert cfg.load_config(str(path)).train.epochs == 7


@pytest.mark.parametrize(
    ("text", "meant", "pyyaml"),
    [
        ("1e-3", 1e-3, "1e-3"),
        ("no", "no", False),
        ("on", "on", True),
        ("010", 10, 8),
        ("12:30:45", "12:30:45", 45045),
        ("2024-01-01", "2024-01-01", None),
        ("1_000", "1_000", 1000),
        ("0x10", 16, 16),
        ("0o17", 15, "0o17"),
        ("1.", 1.0, 1.0),
        (".5", 0.5, 0.5),
        ("~", None, None),
        ("", None, None),
        ("true", True, True),
        ("-7", -7, -7),
    ],
)
def test_yaml_traps_are_closed(text, meant, pyyaml):
    value = yaml12.loads(text, "x")
    assert value == meant
    assert type(value) is type(meant)
    if pyyaml is not None:
        assert yaml.safe_load(text) == pyyaml, "the trap this closes has changed"


@pytest.mark.parametrize("value", ["no", "010", "12:30:45", "1e-3", "null", "true", "1.5", "", " x", "a: b", "é"])
def test_text_that_looks_like_something_else_survives_writing_and_reading(value):
    assert yaml12.loads(yaml12.dumps({"k": value}), "x") == {"k": value}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.batchsize=4"], ["data.batchsize", "did you mean 'data.batch_size'"]),
        (["batch_size=4"], ["'batch_size'", "did you mean 'data.batch_size'"]),
        (["nonsense=4"], ["unknown key 'nonsense'"]),
        (["data.batch_size=abc"], ["data.batch_size=abc", "valid integer", "'abc'"]),
        (["data.batch_size='512'"], ["valid integer"]),
        (["data.batch_size=true"], ["valid integer"]),
        (["data.batch_size=1.5"], ["valid integer"]),
        (["optim.lr=0"], ["optim.lr", "greater than 0"]),
        (["optim.lr=.nan"], ["optim.lr", "finite"]),
        (["optim.lr=1e999"], ["optim.lr", "finite"]),
        (["deterministic=no"], ["deterministic", "valid boolean", "'no'"]),
        (["model.stem=big"], ["override 'model.stem=big': unknown model.stem 'big'", "known: auto, small, standard"]),
        (["model.stem=3"], ["model.stem", "'auto', 'small' or 'standard'", "not 3"]),
        (["train.deepspeed.zero=3"], ["train.deepspeed.zero", "0, 1 or 2", "not 3"]),
        (
            ["loss.name=supcom_out"],
            ["unknown loss.name 'supcom_out'; did you mean 'supcon_out'? known: barlow_twins, "],
        ),
        (["loss.terms={tcl: 1, tlc: 1}"], ["unknown loss.terms 'tlc'; did you mean 'tcl'? known: barlow_twins, "]),
        (["loss.terms={tcl: 0}"], ["loss.terms: input should be greater than 0"]),
        (
            ["probe.kind=[knn, liner]"],
            ["unknown probe.kind 'liner'; did you mean 'linear'? known: finetune, knn, linear, "],
        ),
        (["prune.rate=[0.1, a]"], ["prune.rate: ", "valid number, not 'a'"]),
        (["data=3"], ["data is a section", "batch_size"]),
        (["data.views={local: 4}"], ["data.views: give the number of global views as well"]),
        (["data.views.local=4"], ["data.views: give the number of global views as well"]),
        (["data.views={global: 2, locl: 4}"], ["unknown data.views 'locl'; did you mean 'local'?"]),
        (["data.views={global: 2, local: -1}"], ["data.views: ", "greater than or equal to 0"]),
        (["data.views=0"], ["data.views: ", "greater than or equal to 1"]),
        (["augment.solarize=1.5"], ["augment.solarize: ", "less than or equal to 1, not 1.5"]),
        (["augment.solarize=[0.0, 1.5]"], ["augment.solarize: ", "less than or equal to 1, not 1.5"]),
        (["augment.local.crop_scale=[0.5, 0.2]"], ["augment.local.crop_scale: 0.5 is above 0.2"]),
        (["data.batch_size.x=3"], ["data.batch_size"]),
        (
            ["augment.crop_scale=[0.5,0.2]"],
            ["override 'augment.crop_scale=[0.5,0.2]': augment.crop_scale", "[low, high]"],
        ),
        (["augment.crop_scale=[0.5,1.2]"], ["crop_scale", "1.0"]),
        (["probe.linear.lrs=[]"], ["probe.linear.lrs"]),
        (["probe.linear.lrs=[a]"], ["probe.linear.lrs", "valid number"]),
        (["checkpoint.keep=1"], ["checkpoint.keep"]),
        (["lonely"], ["key.sub=value"]),
        (["=3"], ["key.sub=value"]),
        (["data..x=3"], ["key.sub=value"]),
        (["optim={lr: 1, lr: 2}"], ["given twice"]),
        (["optim={lr: [}"], ["not valid YAML"]),
        (["name=!!python/object/apply:os.system [ls]"], ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_named(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        cfg.load_config("default", overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", ["line 3", "'lr' is given twice"]),
        ("optim:\n  lr: [1\n", ["not valid YAML", "line"]),
        ("- a\n", ["mapping"]),
        ("1: 2\n", ["not text"]),
        ("optim: !!python/name:os.system\n", ["not valid YAML"]),
        ("train:\n  epoch: 3\n", ["'train.epoch'", "did you mean 'train.epochs'"]),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        cfg.load_config(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_a_wrong_name_is_blamed_on_the_file_or_override_that_gives_it(tmp_path):
    (tmp_path / "base.yaml").write_text("loss: {name: nonsense}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\noptim: {lr: 1.0}\n")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/base\.yaml: unknown loss\.name 'nonsense'; known: "):
        cfg.load_config(tmp_path / "mine.yaml", ["optim.lr=0.1"])
    with pytest.raises(ConfigError, match=r"^override 'loss\.name=no': unknown loss\.name 'no'"):
        cfg.load_config(tmp_path / "mine.yaml", ["loss.name=no"])


def test_settings_that_contradict_each_other_are_blamed_on_those_who_give_them(tmp_path):
    (tmp_path / "one.yaml").write_text("data: {views: 1}\n")
    both = rf"^override 'loss\.name=simclr' and {tmp_path}/one\.yaml: loss\.name=simclr .* data\.views of 2 or more$"
    with pytest.raises(ConfigError, match=both):
        cfg.load_config(tmp_path / "one.yaml", ["loss.name=simclr"], stages=("pretrain",))
    assert cfg.load_config(tmp_path / "one.yaml", ["loss.name=simclr"]).data.views == 1, "checked for no stage"
    with pytest.raises(ConfigError, match=r"^override 'optim\.nesterov=true': optim\.nesterov is for sgd and lars"):
        cfg.load_config("default", ["optim.nesterov=true", "optim.name=adamw"])


def test_a_missing_or_binary_file_and_an_unknown_recipe_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        cfg.load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        cfg.load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match=r"unknown recipe 'mnits'; did you mean 'mnist'\?"):
        cfg.load_config("mnits")


def test_the_digest_ignores_paths_and_logging_and_nothing_else():
    base = cfg.digest(cfg.load_config())
    for neutral in ("run_dir=/x", "name=y", "data.root=/z", "log.every_steps=3", "checkpoint.keep=5"):
        assert cfg.digest(cfg.load_config("default", [neutral])) == base
    for meant in ("seed=1", "optim.lr=0.4", "data.batch_size=128", "augment.flip=0.1", "train.precision=fp32"):
        assert cfg.digest(cfg.load_config("default", [meant])) != base


def test_differences_name_old_and_new_values():
    old, new = cfg.load_config(), cfg.load_config("default", ["optim.lr=0.25", "name=other"])
    assert cfg.differences(old, new) == ["optim.lr: 0.5 -> 0.25"]


def test_the_schema_explains_every_setting():
    rows = cfg.schema_rows()
    assert [r[0] for r in rows] == list(cfg.flatten(cfg.load_config()))
    assert all(kind and default and meaning for _, kind, default, _, meaning in rows)


@given(st.text(max_size=60))
def test_no_text_gives_anything_but_data_or_a_named_error(text):
    with contextlib.suppress(ConfigError):
        cfg.load_config("default", [text])


@given(
    st.dictionaries(
        st.sampled_from(["data", "optim", "name", "seed", "x"]),
        st.one_of(
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.none(),
            st.booleans(),
            st.lists(st.integers(), max_size=3),
            st.dictionaries(
                st.sampled_from(["lr", "batch_size", "y"]), st.floats() | st.text(max_size=3), max_size=3
            ),
        ),
        max_size=4,
    )
)
def test_no_mapping_gives_anything_but_a_config_or_a_named_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_text(yaml12.dumps(data), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        cfg.load_config(path)


def test_a_number_of_views_and_a_mapping_replace_each_other_and_a_mapping_has_keys(tmp_path):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("data: {views: {global: 2, local: 6}}", encoding="utf-8")
    child.write_text("base: ./base.yaml\ndata: {views: 3}", encoding="utf-8")
    config = cfg.load_config(base)
    assert (config.data.views, config.data.crops) == ({"global": 2, "local": 6}, (2, 6))
    assert cfg.load_config(base, ["data.views.local=4"]).data.crops == (2, 4)
    assert cfg.load_config(base, ["data.views={local: 1}"]).data.crops == (2, 1)
    assert (cfg.load_config(child).data.views, cfg.load_config(child).data.crops) == (3, (3, 0))
    assert cfg.load_config(child, ["data.views={global: 2}"]).data.crops == (2, 0)
    assert cfg.validated(cfg.load_config(base).model_dump_json(), {}, "").data.crops == (2, 6)
    assert cfg.differences(config, cfg.load_config(child)) == [
        "data.views.global: 2 -> None", "data.views.local: 6 -> None", "data.views: None -> 3",
    ]  # fmt: skip


def test_a_recipe_builds_on_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: mnist\noptim: {lr: 0.25, momentum: 0.8}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\noptim: {lr: 0.125}\n")
    loaded = cfg.load_config(tmp_path / "sub" / "b.yaml", ["train.epochs=3"])
    assert (loaded.data.source, loaded.optim.momentum, loaded.optim.lr) == ("mnist", 0.8, 0.125)
    assert loaded.train.epochs == 3
    assert cfg.load_config("mnist").optim.momentum == cfg.load_config().optim.momentum


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml"}, "leads back"),
        ({"a": "base: b.yaml", "b": "base: ./a.yaml"}, "leads back"),
        ({"a": "base: [b]"}, "base must be"),
        ({"a": "base: mnits"}, "mnist"),
        ({"a": "base: gone.yaml"}, "gone.yaml: cannot be read"),
        ({"a": "base: b.yaml", "b": "optim: {learning_rate: 1}"}, "b.yaml: unknown key"),
    ],
)
def test_a_base_that_cannot_be_is_named(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        cfg.load_config(tmp_path / "a.yaml")
