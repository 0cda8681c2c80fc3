"""`hpc-supcon prune` with other methods, scopes and schedules: what is pruned, what is trained, what is written."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from hpc_supcon import checkpoint
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.evaluation import prune_task
from hpc_supcon.evaluation.classifier import as_layer
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.features import fit_standardization
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.evaluation.probes import FittedProbe
from hpc_supcon.pruning import (
    PRUNERS,
    PrunerSpec,
    PruneTask,
    Scored,
    WeightMasks,
    build_masks,
    prunable,
    score_weights,
)
from hpc_supcon.run_folder import read_config
from hpc_supcon.stages import pretrain as pretrain_stage
from hpc_supcon.stages import prune as prune_stage
from hpc_supcon.training import validation
from hpc_supcon.training.build import build_training
from hpc_supcon.training.data import load_data
from hpc_supcon.training.resume import resume_newest
from tests.commands import run, succeed
from tests.unit.cli.test_prune import FAST, results_of
from tests.unit.pruning.test_pruning import assert_pruned, torch_masks

RUNTIME = Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dense run, which tests must not change; it has the checkpoints of its steps 4 and 8."""
    folder = tmp_path_factory.mktemp("dense") / "r"
    succeed("run", "default", *FAST, "checkpoint.keep_every_steps=4", "checkpoint.every_steps=4", f"run_dir={folder}")
    return folder


@pytest.fixture
def dense(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "r")


def prune(capsys, folder, *settings, code=0):
    """(entries of results.json, stdout, stderr) of the command."""
    found, out, err = run(capsys, "prune", folder, *settings)
    assert found == code, err
    return results_of(folder) if (folder / "results.json").exists() else [], out, err


def zeros_of(folder):
    weights = prunable(load_model(folder)[0].encoder)
    return {name: int((weight == 0).sum()) for name, weight in weights.items()}


def test_two_of_four_weights_are_kept_where_the_width_allows(capsys, dense):
    entries, out, err = prune(capsys, dense, "prune.scope=2:4", "prune.method=lamp")
    about = entries[0]["prune"]
    assert entries[0]["folder"] == "pruned/lamp-2of4"
    weights = prunable(load_model(dense / "pruned/lamp-2of4")[0].encoder)
    skipped = [name for name, weight in weights.items() if weight.shape[1] % 4]
    assert about["skipped"] == skipped != []
    assert "not pruned, because 4 does not divide their input channels: " + skipped[0] in err
    for name, weight in weights.items():
        kept = (weight != 0).movedim(1, -1)
        assert kept.all() if name in skipped else (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        assert about["rates"][name] == (0 if name in skipped else 0.5)
    assert about["rate"] == round(about["zeros"] / about["weights"], 4) < 0.5
    assert "lamp, 2:4, oneshot" in out


def test_the_table_compares_the_prunings_of_one_checkpoint(capsys, dense):
    prune(capsys, dense, "prune.rate=0.5")
    _, out, _ = prune(capsys, dense, "prune.rate=0.5", "prune.method=random")
    rows = [line.split("│") for line in out.splitlines() if "knn" in line]
    assert [[cell.strip() for cell in row[1:3]] for row in rows] == [["l1", "0.5"], ["random", "0.5"]]
    assert "method" in out
    masks = build_masks(
        score_weights("random", PruneTask(prunable(load_model(dense)[0].encoder))).scores, 0.5, "global"
    )
    other = prunable(load_model(dense / "pruned/random-global-0.5")[0].encoder)
    assert any(not torch.equal(other[name] == 0, ~mask) for name, mask in masks.items()), "drawn from the run's seed"


def test_entries_and_table_have_knn_and_silhouette_where_they_are_measured_and_a_figure_is_drawn(capsys, dense):
    entries, out, _ = prune(capsys, dense, "prune.rate=[0, 0.5]", "probe.kind=[softmax, knn]", "probe.embedding=true")
    for entry in entries:
        folder = dense / entry["folder"]
        own = {e["probe"]: e["test"]["accuracy"] for e in results_of(folder)}
        silhouette = json.loads((folder / "scores.json").read_text())["embedding"]["encoder"]["silhouette"]
        assert entry["features"] == {"knn": own["knn"], "silhouette": silhouette}
        assert silhouette is not None
    shown = next(line for line in out.splitlines() if "┃ rate" in line)
    assert "kNN ┃ silhouette ┃" in shown
    first = (dense / "plots/pruning.png").read_bytes()
    entries, out, _ = prune(
        capsys, dense, "prune.rate=0.5", "prune.method=random", "probe.kind=linear", "probe.linear.epochs=1",
        "probe.embedding=false",
    )  # fmt: skip
    assert entries[-1]["features"] == {"knn": None, "silhouette": None}
    assert "silhouette" not in out
    assert (dense / "plots/pruning.png").read_bytes() != first


def test_pruning_a_pruned_run_counts_its_zeros(capsys, dense):
    prune(capsys, dense, "prune.rate=0.6")
    first = dense / "pruned/l1-global-0.6"
    before = prunable(load_model(first)[0].encoder)
    for method in ("l1", "random"):
        entries, _, err = prune(capsys, first, "prune.rate=[0.3, 0.8]", f"prune.method={method}")
        assert "prune.rate=0.3, but 0.6 of the weights are pruned already: they stay pruned" in err
        for rate, entry in zip((0.6, 0.8), entries[-2:], strict=True):
            assert entry["prune"]["zeros"] == round(rate * entry["prune"]["weights"])
            after = prunable(load_model(first / entry["folder"])[0].encoder)
            assert not any((after[name][before[name] == 0] != 0).any() for name in before)


def test_rounds_prune_what_the_round_before_has_trained(capsys, dense):
    tune = ["prune.schedule=iterative", "prune.steps=2", "prune.rate=0.75", "prune.finetune.iterations=3"]
    entries, _, _ = prune(capsys, dense, *tune)
    rates = [0.5, 0.75]  # each round prunes half of what is left
    assert [e["folder"] for e in entries] == [f"pruned/l1-global-{rate:g}-iterative" for rate in rates]
    model, _ = load_model(dense)
    for rate, entry in zip(rates, entries, strict=True):
        masks = torch_masks(model.encoder, rate, "global")
        folder = dense / entry["folder"]
        found, _ = checkpoint.load_newest(folder / "checkpoints")
        assert_pruned(found.tensors["model"], masks)
        assert entry["prune"]["zeros"] == round(rate * entry["prune"]["weights"])
        assert (entry["prune"]["finetune_steps"], entry["prune"]["dense_checkpoint"]) == (3, "step-8")
        model, _ = load_model(folder)
    before = (dense / entries[-1]["folder"] / "checkpoints/step-3/model.safetensors").read_bytes()
    shutil.rmtree(dense / entries[-1]["folder"])
    prune(capsys, dense, *tune, "--resume")  # the first one is complete
    assert (dense / entries[-1]["folder"] / "checkpoints/step-3/model.safetensors").read_bytes() == before


def test_rounds_may_be_given_and_fine_tuned_at_the_end_alone(capsys, dense):
    entries, _, _ = prune(
        capsys, dense, "prune.schedule=iterative", "prune.rate=[0.3, 0.7]", "prune.finetune.iterations=2",
        "prune.finetune.between=false",
    )  # fmt: skip
    assert [e["prune"]["finetune_steps"] for e in entries] == [0, 2]
    masks = torch_masks(load_model(dense)[0].encoder, 0.7, "global")
    found, _ = checkpoint.load_newest(dense / entries[1]["folder"] / "checkpoints")
    assert_pruned(found.tensors["model"], masks)


def recorded_starts(monkeypatch):
    """(settings, start, a copy of its weights) of every fine-tuning from now on."""
    starts = []

    def recorded(config, *arguments, start, **more):
        starts.append((config, start, {name: p.clone() for name, p in start.model.state_dict().items()}))
        return pretrain_stage.pretrain(config, *arguments, start=start, **more)

    monkeypatch.setattr(prune_stage, "pretrain", recorded)
    return starts


@pytest.mark.parametrize("rewind", ["initial", "step 4", "epoch 2"])
def test_rewound_weights_are_those_of_that_time_under_the_masks_of_the_trained_ones(
    capsys, dense, monkeypatch, rewind
):
    starts = recorded_starts(monkeypatch)
    prune(capsys, dense, "prune.rate=0.5", f"prune.rewind={rewind}", "prune.finetune.iterations=1")
    config, start, weights = starts[0]
    run_config = read_config(dense)
    if rewind == "initial":
        want = build_training(run_config, load_data(run_config, RUNTIME), RUNTIME).state.model.state_dict()
        assert start.objective is None
    else:
        early = checkpoint.load_checkpoint(dense / "checkpoints" / {"step 4": "step-4", "epoch 2": "step-8"}[rewind])
        want = early.tensors["model"]
        assert start.objective.keys() == early.tensors["objective"].keys() != set()
    masks = torch_masks(load_model(dense)[0].encoder, 0.5, "global")
    for name, tensor in want.items():
        mask = masks.get(name.removeprefix("encoder."), torch.tensor(True))
        assert torch.equal(weights[name], torch.where(mask, tensor, torch.zeros_like(tensor))), name
    assert config.optim.lr == run_config.optim.lr, "the whole peak"


GRADUAL = ["prune.schedule=gradual", "prune.steps=4", "prune.interval=3", "prune.finetune.iterations=15"]


def test_gradual_pruning_follows_the_ramp_and_ends_at_the_rate(capsys, dense):
    entries, _, _ = prune(capsys, dense, *GRADUAL, "prune.rate=0.75", "checkpoint.every_steps=1",
                            "checkpoint.keep=20")  # fmt: skip
    folder = dense / "pruned/l1-global-0.75-gradual"
    assert (entries[0]["folder"], entries[0]["checkpoint"]) == ("pruned/l1-global-0.75-gradual", "step-15")
    total, earlier = entries[0]["prune"]["weights"], None
    for step in range(1, 16):
        found = checkpoint.load_checkpoint(folder / f"checkpoints/step-{step}")
        zero = {name: found.tensors["model"][f"encoder.{name}"] == 0 for name in zeros_of(dense)}
        rate = 0.75 - 0.75 * (1 - min(step // 3, 4) / 4) ** 3
        assert sum(int(z.sum()) for z in zero.values()) == round(rate * total), step
        if earlier is not None:
            assert not any((earlier[name] & ~zero[name]).any() for name in zero), "a pruned weight came back"
        for name, z in zero.items():
            assert not found.tensors["ema"][f"encoder.{name}"][z].any()
            assert not found.tensors["optimizer"][f"encoder.{name}/momentum_buffer"][z].any()
        earlier = zero
    assert entries[0]["prune"]["zeros"] == round(0.75 * total)
    exported = folder / "exported.safetensors"
    code, _, err = run(capsys, "export", folder, "--format", "safetensors", "--out", exported)
    assert code == 0, err
    weights = {name: w for name, w in safetensors.torch.load_file(exported).items() if w.ndim > 1}
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.75 * total)


def test_gradual_pruning_that_was_cut_goes_on_also_as_a_training(capsys, dense):
    prune(capsys, dense, *GRADUAL, "prune.rate=0.75", "checkpoint.every_steps=5", "prune.label=a")
    folder = dense / "pruned/l1-global-0.75-gradual-a"
    names = ("model", "ema", "masks", "optimizer")
    want = {name: (folder / f"checkpoints/step-15/{name}.safetensors").read_bytes() for name in names}
    shutil.rmtree(folder / "checkpoints/step-15")
    code, _, err = run(capsys, "pretrain", folder / "config.yaml", "--resume")
    assert code == 0, err
    assert "going on from step 10" in err
    for name, payload in want.items():
        assert (folder / f"checkpoints/step-15/{name}.safetensors").read_bytes() == payload, name


def test_a_ramp_that_does_not_end_within_the_epochs_is_refused_before_the_model_is_loaded(capsys, dense):
    settings = ["prune.schedule=gradual", "prune.steps=5", "prune.interval=2", "prune.finetune.epochs=2"]
    _, _, err = prune(capsys, dense, *settings, code=2)
    assert "prune.steps=5 prunings, one every 2 steps, end after the 8 steps of fine-tuning" in err
    assert not (dense / "pruned").exists()


@pytest.mark.parametrize("loss", ["run", "cross_entropy"])
def test_the_scan_is_kept_and_goes_on_where_it_was_interrupted(capsys, dense, monkeypatch, loss):
    calls = []
    build = validation.build_validate

    def counted(*arguments):
        validate = build(*arguments)

        def once():
            calls.append(1)
            if len(calls) == 4 and not stopped:
                stopped.append(1)
                raise KeyboardInterrupt
            return validate()

        return once

    stopped: list[int] = []
    monkeypatch.setattr(prune_task, "build_validate", counted)
    settings = ["prune.method=layer_sensitive", "prune.rate=[0.5, 0.7]", f"prune.loss={loss}",
                "prune.scan.rates=[0.3, 0.6, 0.9]", "probe.linear.epochs=3"]  # fmt: skip
    run(capsys, "prune", dense, *settings)
    (path,) = (dense / "sensitivity").glob("*.json")
    assert path.name.startswith(f"{loss}-")
    assert len(json.loads(path.read_text())["cells"]) == 3
    calls.clear()
    entries, _, err = prune(capsys, dense, *settings)
    layers = zeros_of(dense)
    assert len(calls) == 1 + 3 * len(layers) - 3
    assert f"has 2 of {3 * len(layers)} losses already" in err
    scan = json.loads(path.read_text())
    assert scan["weights"].keys() == layers.keys()
    assert scan["cells"].keys() == {"dense", *(f"{name}@{rate}" for name in layers for rate in (0.3, 0.6, 0.9))}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for entry in entries[-2:]:
        assert entry["prune"]["zeros"] == round(entry["prune"]["rate"] * entry["prune"]["weights"])
        own = zeros_of(dense / entry["folder"])
        assert entry["prune"]["rates"] == {name: round(n / scan["weights"][name], 4) for name, n in own.items()}
        assert len(set(entry["prune"]["rates"].values())) > 1
    calls.clear()
    prune(capsys, dense, *settings, "prune.label=again", "prune.scan.rates=[0.3, 0.6, 0.8, 0.9]")
    assert len(calls) == len(layers), "only the new rate is measured"


def test_the_scan_of_the_runs_loss_measures_what_validation_logs(capsys, dense):
    """The loss with nothing pruned is that of the event "validation" of a run that starts from these weights."""
    prune(capsys, dense, "prune.method=layer_sensitive", "prune.scan={rates: [0.9], images: null}")
    (path,) = (dense / "sensitivity").glob("run-*.json")
    config = read_config(dense, ["validation.every_steps=1", "train.ema=null"])
    data, (model, found) = load_data(config, RUNTIME), load_model(dense)
    training = build_training(config, data, RUNTIME)
    training.state.model.load_state_dict(model.state_dict())
    training.state.objective.load_state_dict(found.tensors["objective"])
    validate = validation.build_validate(config, data, training, RUNTIME, None)
    cells = json.loads(path.read_text())["cells"]
    assert cells["dense"] == validate()["loss"]
    name, weight = next(iter(prunable(training.state.model.encoder).items()))
    WeightMasks(training.state.model.encoder, build_masks({name: weight.abs()}, 0.9, "layer"))
    assert cells[f"{name}@0.9"] == pytest.approx(validate()["loss"], rel=1e-6)


def test_fine_tuning_with_cross_entropy_starts_from_the_linear_probe(capsys, dense, monkeypatch):
    prune(capsys, dense, "prune.rate=0.5", "prune.label=plain", "probe.kind=linear", "probe.linear.epochs=20")
    probe = as_layer(load_probe(dense / "pruned/l1-global-0.5-plain/probes/linear")).state_dict()
    starts = recorded_starts(monkeypatch)
    settings = ["prune.rate=0.5", "prune.finetune.loss=cross_entropy", "probe.linear.epochs=20"]
    entries, _, _ = prune(capsys, dense, *settings, "prune.finetune.iterations=6")
    entry = entries[-1]
    folder = dense / entry["folder"]
    assert entry["prune"]["finetune_loss"] == "cross_entropy"
    assert read_config(folder).loss.weights == {"cross_entropy": 1.0}
    found, _ = checkpoint.load_newest(folder / "checkpoints")
    assert_pruned(found.tensors["model"], torch_masks(load_model(dense)[0].encoder, 0.5, "global"))
    assert {name for name in found.tensors["model"] if name.startswith("heads.")} == {
        "heads.classifier.weight", "heads.classifier.bias",
    }  # fmt: skip
    for name, tensor in probe.items():
        torch.testing.assert_close(starts[0][2][f"heads.classifier.{name}"], tensor)
    again, _, _ = prune(
        capsys, dense, "prune.schedule=iterative", "prune.rate=[0.3, 0.6]", "prune.finetune.loss=cross_entropy",
        "prune.finetune.iterations=2", "probe.linear.epochs=2",
    )  # fmt: skip
    assert [e["prune"]["zeros"] / e["prune"]["weights"] for e in again[-2:]] == pytest.approx([0.3, 0.6], abs=1e-4)


REFUSED = {
    "no checkpoint of that step": (
        ["prune.rewind=step 5", "prune.finetune.iterations=1"],
        "prune.rewind=step 5: the run has checkpoints of the steps 4, 8; checkpoint.keep_every_steps keeps more",
    ),
    "no checkpoint of that epoch": (
        ["prune.rewind=epoch 9", "prune.finetune.iterations=1"],
        "prune.rewind=epoch 9, which is step 36: the run has checkpoints of the steps 4, 8",
    ),
    "a pattern that fits no layer": (["prune.scope=3:7"], "prune.scope=3:7: no layer has a number of input channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_run_does_not_allow_is_refused_and_nothing_written(capsys, whole, case):
    settings, said = REFUSED[case]
    code, out, err = run(capsys, "prune", whole, *settings)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert not (whole / "pruned").exists()


def test_a_method_that_compensates_changes_the_weights_that_are_left(capsys, dense, monkeypatch):
    """The place where second-order methods fit in: scores from gradients, new values from the masks."""
    seen = []

    def score(task):
        (gradient,) = task.gradients(1)
        scores = {name: (weight.detach() * gradient[name]).abs() for name, weight in task.weights.items()}

        def compensate(masks):
            seen.append(masks)
            return {name: 2 * weight.detach() for name, weight in task.weights.items()}

        return Scored(scores, compensate=compensate)

    monkeypatch.setitem(PRUNERS, "l1", PrunerSpec(score, needs="gradients"))
    entries, _, _ = prune(capsys, dense, "prune.rate=[0.4, 0.5]", "prune.loss=cross_entropy", "probe.linear.epochs=2")
    before = prunable(load_model(dense)[0].encoder)
    for entry, masks in zip(entries, seen, strict=True):
        after = prunable(load_model(dense / entry["folder"])[0].encoder)
        for name, weight in after.items():
            assert torch.equal(weight, 2 * before[name] * masks[name]), name
        assert entry["prune"]["zeros"] == round(entry["prune"]["rate"] * entry["prune"]["weights"])


def test_a_linear_probe_as_one_layer_gives_the_same_logits():
    torch.manual_seed(0)
    description = {"kind": "linear", "input": "features", "in_dim": 7, "standardize": True, "normalization": {}}
    probe = FittedProbe({**description, "classes": list("abc"), "encoder": None}, head=torch.nn.Linear(7, 3))
    x = torch.randn(50, 7) * 3 + 5
    fit_standardization(probe.prepare, x)
    torch.testing.assert_close(as_layer(probe)(x), probe.logits(x), rtol=1e-5, atol=1e-5)


def test_a_pruned_run_does_not_go_on_with_deepspeed(capsys, dense):
    """Its engine keeps copies of the weights, of which the pruned ones would grow."""
    prune(capsys, dense, "prune.rate=0.5")
    folder = dense / "pruned/l1-global-0.5"
    config = read_config(folder)
    data = load_data(config, RUNTIME)
    state = build_training(config, data, RUNTIME).state
    other = read_config(folder, ["train.engine=deepspeed"])
    with pytest.raises(ConfigError, match=r"step-0: is pruned, and train\.engine=deepspeed keeps copies"):
        resume_newest(state, folder, RUNTIME, other, data)
