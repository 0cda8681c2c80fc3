"""Expansion of a grid file: its cells, what they share, and what is refused before anything starts."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from hpc_supcon import config as cfg
from hpc_supcon.config import yaml12
from hpc_supcon.errors import ConfigError
from hpc_supcon.grid.cells import MAX_NAME_LENGTH, UniqueNames, load, slug
from hpc_supcon.grid.expand import expand
from hpc_supcon.grid.schema import minutes_of, read_profile

AXES = {
    "model.encoder": ["conv", "resnet18"],
    "loss.name": ["supcon_in", "supcon_out", "tcl"],
    "batch": {"64": {"data.batch_size": 64, "optim.lr": 0.1}, "32": {"data.batch_size": 32, "optim.lr": 1}},
}


@pytest.fixture
def plan(tmp_path):
    """plan(overrides=(), **keys) -> the expanded grid with these keys."""

    def make(*overrides, **keys):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml12.dumps({"name": "g", "base": "quickstart", **keys}))
        return expand(load(path), overrides)

    return make


def test_the_cells_are_the_product_of_the_axes_and_seeds(plan):
    found = plan(axes=AXES, seeds=[3, 5])
    want = list(itertools.product(AXES["model.encoder"], AXES["loss.name"], ["64", "32"], ["3", "5"]))
    assert [tuple(cell.labels.values()) for cell in found.cells] == want
    assert len({cell.name for cell in found.cells}) == len(want)
    names = list(found.nodes)
    for node in found.nodes.values():
        assert node.parent is None or names.index(node.parent) < names.index(node.name)


def test_the_configuration_of_a_cell_is_that_of_the_command_line_with_the_same_settings(plan):
    found = plan("data.root=/x", axes=AXES, set={"train.epochs": 3})
    for cell in found.cells:
        node = found.nodes[cell.nodes[0]]
        batch = AXES["batch"][cell.labels["batch"]]
        settings = {"model.encoder": cell.labels["model.encoder"], "loss.name": cell.labels["loss.name"], **batch}
        overrides = [f"{key}={value}" for key, value in settings.items()]
        want = cfg.load_config("quickstart", ["data.root=/x", "train.epochs=3", "seed=0", *overrides])
        assert node.resolved.digest == cfg.digest(want)
        assert yaml12.loads(node.resolved.yaml(), "cell") == want.model_dump(mode="json")


def test_the_configuration_of_a_cell_can_be_written_and_loaded(plan, tmp_path):
    node = next(iter(plan(axes=AXES).nodes.values()))
    path = tmp_path / "cell.yaml"
    hostile = 'a "quoted" \\ name: with # and \n newline'
    path.write_text(node.resolved.yaml(name=hostile, run_dir="/tmp/a b"))
    loaded = cfg.load_config(path)
    assert (loaded.name, loaded.run_dir) == (hostile, "/tmp/a b")
    assert cfg.digest(loaded) == node.resolved.digest


def test_cells_that_differ_in_their_probe_share_one_pretraining(plan):
    found = plan(axes={"loss.name": ["supcon_in", "tcl"], "probe.linear.epochs": [1, 2, 3]})
    stages = [node.stage for node in found.nodes.values()]
    assert (stages.count("pretrain"), stages.count("probe"), len(found.cells)) == (2, 6, 6)
    for cell in found.cells:
        parent, probe = (found.nodes[name] for name in cell.nodes)
        assert probe.parent == parent.name
        assert probe.folder != parent.folder, "two probes must not write to the same results.json"
        assert parent.resolved.parts["loss"].data["name"] == cell.labels["loss.name"]
        assert str(probe.resolved.parts["probe"].data["linear"]["epochs"]) == cell.labels["probe.linear.epochs"]


def test_without_a_probe_axis_both_stages_share_a_run_folder(plan):
    for cell in (found := plan(axes=AXES)).cells:
        assert {found.nodes[name].folder for name in cell.nodes} == {cell.name}


def test_a_pruning_axis_reuses_one_pretraining_per_encoder_loss_and_seed(plan):
    axes = {"model.encoder": ["conv", "resnet18"], "loss.name": ["supcon_in", "tcl"], "prune.rate": [None, 0.2, 0.5]}
    found = plan(axes=axes, seeds=2)
    stages = [node.stage for node in found.nodes.values()]
    assert (stages.count("pretrain"), stages.count("probe"), stages.count("prune")) == (8, 8, 16)
    for cell in found.cells:
        last = found.nodes[cell.nodes[-1]]
        assert (last.stage == "prune") == (cell.labels["prune.rate"] != "null")
        if last.stage == "prune":
            assert found.nodes[last.parent].stage == "pretrain"
            assert str(last.resolved.parts["prune"].data["rate"]) == cell.labels["prune.rate"]


def test_exclude_and_include(plan):
    found = plan(
        axes=AXES,
        exclude=[{"model.encoder": "conv", "batch": ["64", "32"]}, {"optim.lr": 1, "loss.name": "tcl"}],
        include=[{"model.encoder": "conv", "loss.name": "simclr", "optim.lr": 0.3}],
    )
    labels = [cell.labels for cell in found.cells]
    assert [(x["loss.name"], x.get("batch")) for x in labels] == [
        ("supcon_in", "64"), ("supcon_in", "32"), ("supcon_out", "64"), ("supcon_out", "32"),
        ("tcl", "64"), ("simclr", None),
    ]  # fmt: skip
    assert labels[-1]["optim.lr"] == "0.3"


def test_an_axis_may_choose_the_recipe(plan):
    found = plan(base="latent-{method}-mnist", axes={"method": {"supcon": {}, "guided": {}}})
    losses = [found.nodes[cell.nodes[0]].resolved.parts["loss"].data["name"] for cell in found.cells]
    assert losses == ["supcon_out", "cross_entropy_mae"]
    found = plan(axes={"recipe": {"a": {"base": "mnist"}, "b": {"base": "quickstart"}}})
    sources = [found.nodes[cell.nodes[0]].resolved.parts["data"].data["source"] for cell in found.cells]
    assert sources == ["mnist", "digits"]


def test_resources_of_matching_cells_and_the_total_hours(plan):
    found = plan(
        axes={"loss.name": ["supcon_in", "tcl"]},
        seeds=2,
        resources={
            "pretrain": {"gpus": 2, "cpus": 3, "minutes": "1:30:00"},
            "probe": {"minutes": 30},
            "where": [{"cells": {"loss.name": "tcl"}, "pretrain": {"nodes": 2, "minutes": 120}}],
        },
    )
    asked = {cell.labels["loss.name"]: found.nodes[cell.nodes[0]].resources for cell in found.cells}
    assert (asked["supcon_in"].nodes, asked["supcon_in"].minutes) == (1, 90)
    assert (asked["tcl"].nodes, asked["tcl"].gpus, asked["tcl"].minutes) == (2, 2, 120)
    gpu, cpu, longest = found.hours
    assert gpu == pytest.approx(2 * (2 * 1.5 + 4 * 2))
    assert cpu == pytest.approx(2 * (6 * 1.5 + 12 * 2 + 2 * 0.5))
    assert longest == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("12:30:45", 751),
        ("12:30:00", 750),
        ("5:01", 6),
        ("1-12", 2160),
        ("1-0:30", 1470),
        ("2-00:00:01", 2881),
    ],
)
def test_times_in_the_format_of_slurm(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"axes": {"loss.nam": ["tcl"]}}, r"axis 'loss.nam', value 'tcl': unknown key 'loss.nam'; did you mean"),
        ({"axes": {"data.batch_size": [64, "many"]}}, r"axis 'data.batch_size', value 'many': data.batch_size: "),
        ({"axes": {"loss.name": []}}, "axis 'loss.name': has no values"),
        ({"axes": {"loss.name": ["tcl"]}, "exclude": [{"loss.name": "tcl"}]}, "has no cells"),
        ({"axes": {"data.workers": [1, 2]}}, "cell data.workers=2: computes the same as cell data.workers=1"),
        ({"axes": {"loss.name": ["tcl", "tcl"]}}, "'tcl' is given twice"),
        ({"axes": {"x": {"a": {"loss.k1": 1}, "b": {"loss.k1": 1.0}}}}, "computes the same"),
        ({"axes": {"seed": [1]}}, "give seeds as"),
        ({"axes": AXES, "exclude": [{"model.encode": "conv"}]}, "unknown axis 'model.encode'; did you"),
        ({"axes": AXES, "exclude": [{"loss.name": "sup"}]}, "matches no cell"),
        ({"axes": AXES, "include": [{"batch": "16"}]}, "unknown label '16'"),
        ({"resources": {"pretrain": {"minutes": "soon"}}}, "resources.pretrain.minutes: 'soon' is not a time"),
        ({"resources": {"pretrain": {"gpu": 1}}}, "unknown key 'resources.pretrain.gpu'"),
        ({"axes": AXES, "resources": {"where": [{"cells": {"batch": "64"}, "probe": {"gpu": 1}}]}}, "key 'gpu'"),
        ({"pack": 2, "resources": {"pretrain": {"tasks": 2}}}, "pack: 2 shares a job among runs of one rank"),
        ({"base": "quickstar"}, "unknown recipe 'quickstar'; did you mean 'quickstart'"),
        ({"axis": {}}, "unknown key 'axis'"),
        ({"name": "a b"}, "'a b' cannot name a folder"),
        ({"set": {"loss.k3": 1}}, "set: unknown key 'loss.k3'"),
    ],
)  # fmt: skip
def test_an_invalid_grid_is_an_error_of_one_line_that_names_what_is_wrong(plan, keys, words):
    with pytest.raises(ConfigError, match=words) as caught:
        plan(**keys)
    assert "\n" not in str(caught.value)


def test_included_files_add_their_cells_and_must_not_be_cyclic(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nbase: quickstart\naxes: {loss.name: [tcl]}\ninclude: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("name: b\nbase: mnist\naxes: {loss.name: [simclr, tcl]}\n")
    assert len(expand(load(tmp_path / "a.yaml")).cells) == 3
    (tmp_path / "b.yaml").write_text("name: b\nbase: mnist\ninclude: [a.yaml]\n")
    with pytest.raises(ConfigError, match=r"includes itself: a.yaml -> b.yaml -> a.yaml"):
        load(tmp_path / "a.yaml")


def test_files_that_are_not_a_grid(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a grid"):
        load(tmp_path / "list.yaml")
    (tmp_path / "profile.yaml").write_text("cluster: slum\n")
    with pytest.raises(ConfigError, match="cluster: "):
        read_profile(tmp_path / "profile.yaml")


HOSTILE = [
    "a b",
    "it's",
    'q"uote',
    "new\nline",
    "../up",
    "/abs",
    "-rf",
    ".hidden",
    "$(x)",
    "ä" * 5,
    "",
    "a/b",
    "x" * 300,
]


def test_hostile_labels_become_safe_and_different_names(plan):
    names = [slug(text) for text in HOSTILE]
    assert all(name and not set(name) - set("abcdefghijklmnopqrstuvwxyz-.+0123456789") for name in names)
    assert not any(name.startswith((".", "-")) for name in names)
    found = plan(axes={"v": {text: {"loss.k1": i} for i, text in enumerate(HOSTILE)}})
    names = [cell.name for cell in found.cells]
    assert len(set(names)) == len(HOSTILE)
    assert max(map(len, names)) <= MAX_NAME_LENGTH


def test_names_are_stable_and_different_for_different_identities():
    names = UniqueNames()
    assert names.get(["a", "b"], "1") == names.get(["a", "b"], "1") == "a_b"
    assert names.get(["a_b"], "2") != "a_b"


def test_grids_are_expanded_without_torch(python, tmp_path):
    (tmp_path / "g.yaml").write_text("name: g\nbase: quickstart\naxes: {loss.name: [tcl, simclr]}\n")
    code = (
        "import sys; from hpc_supcon.cli import main; from pathlib import Path\n"
        "from hpc_supcon.grid import submit, node_state, status, worker, folder\n"
        "from hpc_supcon.grid.cells import load; from hpc_supcon.grid.expand import expand\n"
        f"expand(load(Path('{tmp_path}/g.yaml')))\n"
        "import submitit\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([python, "-c", code], check=True)


def test_the_shipped_grids_expand_and_their_small_versions_request_no_gpu(request):
    folder = request.config.rootpath / "launch" / "grids"
    names = {path.stem for path in folder.glob("*.yaml")}
    assert {name for name in names if f"{name}-small" in names} == {n for n in names if not n.endswith("-small")}
    for name in sorted(names):
        found = expand(load(folder / f"{name}.yaml"))
        assert found.name == name
        assert all(table.rows in cell.labels for table in found.tables for cell in found.cells)
        if name.endswith("-small"):
            assert found.hours[0] == 0
            assert len(found.cells) <= 12
    for path in (request.config.rootpath / "launch" / "clusters").glob("*.yaml"):
        read_profile(path)
