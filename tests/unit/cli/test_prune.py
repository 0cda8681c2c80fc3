"""`hpc-supcon prune`: pruned run folders, their results, sizes, fine-tuning, resuming, and mistakes of the user."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.config import check_config, load_config
from hpc_supcon.errors import RunFolderError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.pruning import load_sparse, prunable
from hpc_supcon.run_folder import read_config, read_scores
from hpc_supcon.stages.prune import SPARSE
from hpc_supcon.stages.pruned_run import pruned_config
from hpc_supcon.stages.pruned_weights import check_same_masks
from tests.commands import run, succeed
from tests.dist.ranks import run_ranks
from tests.unit.pruning.test_pruning import assert_pruned, torch_masks

FAST = [
    "report.embeddings=false",
    "data.source=synthetic", "data.synthetic={images: 90, classes: 4, channels: 1, image_size: 8}",
    "data.validation_fraction=0.2", "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16",
    "model.projection_dim=8", "train.epochs=2", "train.ema=0.5", "loss.learnable_temperature=true",
    "log.tensorboard=false", "log.every_steps=1", "runtime.threads=1", "runtime.device=cpu", "train.precision=fp32",
    "probe.kind=[knn, softmax]", "probe.knn.k=3", "probe.softmax.iterations=20", "probe.finetune.epochs=2",
    "probe.finetune.batch_size=16",
]  # fmt: skip


def results_of(folder, stage="prune"):
    return [r for r in json.loads((folder / "results.json").read_text())["results"] if r["stage"] == stage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dense run, which tests must not change."""
    folder = tmp_path_factory.mktemp("dense") / "r"
    succeed("run", "default", *FAST, f"run_dir={folder}")
    return folder


@pytest.fixture
def dense(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "a run's folder")


def test_every_rate_is_a_run_folder_pruned_from_the_dense_encoder(capsys, dense):
    code, out, err = run(capsys, "prune", dense, "prune.rate=[0, 0.5, 0.9]", "prune.scope=layer")
    assert code == 0, err
    model, found = load_model(dense)
    entries = results_of(dense)
    assert [e["folder"] for e in entries] == [f"pruned/l1-layer-{rate}" for rate in ("0", "0.5", "0.9")]
    for rate, entry in zip((0, 0.5, 0.9), entries, strict=True):
        folder = dense / entry["folder"]
        masks = torch_masks(model.encoder, rate, "layer")
        own, best = load_model(folder)
        assert best.path.name == entry["checkpoint"] == "step-0"
        for name, weight in prunable(model.encoder).items():
            assert torch.equal(prunable(own.encoder)[name], weight * masks[name]), name
        zeros = sum(round(rate * mask.numel()) for mask in masks.values())
        weights = sum(mask.numel() for mask in masks.values())
        assert entry["prune"] == {
            "method": "l1", "rate": rate, "scope": "layer", "schedule": "oneshot", "label": None, "loss": None,
            "rewind": None, "finetune_loss": None, "finetune_steps": 0, "zeros": zeros, "weights": weights,
            "rates": {name: round(round(rate * mask.numel()) / mask.numel(), 4) for name, mask in masks.items()},
            "emptied": [], "skipped": [], "dense_checkpoint": found.path.name,
        }  # fmt: skip
        sparse = folder / SPARSE
        assert entry["size"]["sparse_bytes"] == sparse.stat().st_size
        assert all(torch.equal(t, own.encoder.state_dict()[name]) for name, t in load_sparse(sparse).items())
        assert (entry["probe"], entry["stage"], set(entry["test"])) == (
            "knn", "prune", {"accuracy", "f1", "precision", "recall"},
        )  # fmt: skip
        assert results_of(folder) == [entry]
        scores = read_scores(folder)["probes"]["knn"]
        assert (scores["checkpoint"], scores["splits"]["test"]["accuracy"]) == ("step-0", entry["test"]["accuracy"])
        assert (folder / "predictions.parquet").stat().st_size > 0
        row = next(line for line in out.splitlines() if f" {rate:g} " in line and "knn" in line)
        for text in (f"{zeros:,}", f"{entry['size']['sparse_bytes']:,}", f"{entry['test']['accuracy']:.4f}"):
            assert text in row
    assert entries[1]["size"]["sparse_bytes"] < 0.62 * entries[1]["size"]["dense_bytes"]
    assert entries[0]["test"] == results_of(dense, "probe")[0]["test"], "pruning nothing changes nothing"


def test_the_pruned_folder_is_a_run_folder_and_its_encoder_stays_pruned(capsys, dense):
    assert run(capsys, "prune", dense, "prune.rate=0.5")[0] == 0
    folder = dense / "pruned/l1-global-0.5"
    code, _, err = run(capsys, "checkpoints", folder)
    assert code == 0, err
    assert read_config(folder).folder == folder
    code, out, err = run(capsys, "probe", folder, "probe.kind=[linear, finetune]", "probe.linear.epochs=2")
    assert code == 0, err
    assert "step-0" in out
    masks = torch_masks(load_model(dense)[0].encoder, 0.5, "global")
    tuned = load_probe(folder / "probes/finetune").encoder.state_dict()
    assert_pruned(tuned, masks, prefix="")
    assert any(not torch.equal(tuned[name], load_model(folder)[0].encoder.state_dict()[name]) for name in masks)


def test_fine_tuning_continues_with_the_runs_objective_and_keeps_the_zeros(capsys, dense):
    more = ["prune.rate=0.6", "prune.finetune.epochs=2", "prune.finetune.lr=0.05", "prune.label=tuned"]
    code, _, err = run(capsys, "prune", dense, *more)
    assert code == 0, err
    folder = dense / "pruned/l1-global-0.6-tuned"
    config, parent = read_config(folder), read_config(dense)
    assert (config.optim.lr, config.train.epochs, config.loss) == (0.05, 2, parent.loss)
    found, _ = checkpoint.load_newest(folder / "checkpoints")
    steps = 2 * (72 // 16)
    assert found.state["step"] == steps
    dense_model, dense_found = load_model(dense)
    masks = torch_masks(dense_model.encoder, 0.6, "global")
    for part in ("model", "ema"):
        assert_pruned(found.tensors[part], masks)
    start = dense_found.tensors["objective"]
    assert found.tensors["objective"].keys() == start.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    temperatures = [line["temperature"] for line in lines if line["event"] == "train"]
    learned = float(next(iter(start.values())).exp())
    assert abs(temperatures[0] - learned) < abs(temperatures[0] - parent.loss.temperature)
    entry = results_of(dense)[0]
    assert (entry["prune"]["finetune_steps"], entry["checkpoint"]) == (steps, f"step-{steps}")
    assert entry["prune"]["zeros"] == round(0.6 * entry["prune"]["weights"])
    # it is complete already: nothing is trained, the entry is replaced
    weights = found.tensors["model"]
    code, _, err = run(capsys, "prune", dense, *more, "--resume")
    assert code == 0, err
    assert f"going on from step {steps}" in err
    again, _ = checkpoint.load_newest(folder / "checkpoints")
    assert all(torch.equal(t, weights[name]) for name, t in again.tensors["model"].items())
    assert len(results_of(dense)) == 1


def test_resumed_training_of_a_pruned_folder_keeps_it_pruned(capsys, dense):
    run(capsys, "prune", dense, "prune.rate=0.5", "prune.finetune.iterations=3", "checkpoint.every_steps=1")
    folder = dense / "pruned/l1-global-0.5"
    shutil.rmtree(folder / "checkpoints/step-3")
    code, _, err = run(capsys, "pretrain", folder / "config.yaml", "--resume")
    assert code == 0, err
    assert "going on from step 2" in err
    masks = torch_masks(load_model(dense)[0].encoder, 0.5, "global")
    assert_pruned(checkpoint.load_checkpoint(folder / "checkpoints/step-3").tensors["model"], masks)


def test_the_learning_rate_of_fine_tuning_is_a_tenth_by_default():
    for overrides, lr in (
        (["optim.lr=0.5"], 0.05),
        (["optim.lr_per_256=0.2", "data.batch_size=512"], 0.04),
        (["prune.finetune.lr=0.3", "optim.lr_per_256=0.2"], 0.3),
    ):
        config = load_config("default", [*overrides, "prune.finetune.epochs=1"])
        plan = pruned_config(config.folder, config, 0.5)
        assert plan.optim.lr == pytest.approx(lr)
        assert plan.optim.lr_per_256 is None
    one_cycle = ["optim.schedule=one_cycle", "optim.warmup_epochs=3", "optim.final_lr_fraction=0.1"]
    config = load_config("default", [*one_cycle, "prune.finetune.iterations=7", "model.weights=x.pt"])
    plan = pruned_config(config.folder, config, 0.5)
    assert (plan.optim.schedule, plan.optim.warmup_epochs, plan.optim.final_lr_fraction) == ("cosine", 0, 0)
    assert (plan.train.iterations, plan.model.weights) == (7, None)
    untouched = load_config("default", one_cycle)
    assert pruned_config(untouched.folder, untouched, 0.5).optim == untouched.optim


def test_a_run_of_deepspeed_is_fine_tuned_without_it():
    trained = ["train.engine=deepspeed", "train.deepspeed.config={wall_clock_breakdown: true}"]
    config = load_config("default", [*trained, "prune.finetune.epochs=1"], stages=("pretrain",))
    plan = pruned_config(config.folder, config, 0.5)
    check_config(plan, stages=("pretrain",))
    assert (plan.train.engine, plan.train.deepspeed.config) == ("ddp", None)


def test_a_fully_pruned_layer_is_a_warning(capsys, dense):
    model, _ = load_model(dense)
    smallest = min(prunable(model.encoder).items(), key=lambda item: item[1].numel())
    n = smallest[1].numel()
    rate = 1 - 0.3 / n
    code, _, err = run(capsys, "prune", dense, f"prune.rate={rate}", "prune.scope=layer")
    assert code == 0, err
    assert "leaves nothing of" in err
    assert smallest[0] in results_of(dense)[0]["prune"]["emptied"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["prune.rate=1"], ["prune.rate", "prune.rate=1: the share"]),
        (["prune.rate=-0.1"], ["prune.rate", "prune.rate=-0.1: the share"]),
        (["prune.rate=[0.5, 1.5]"], ["prune.rate", "prune.rate=1.5: the share"]),
        (["prune.rate=[]"], ["prune.rate", "empty list"]),
        (["prune.rate=half"], ["prune.rate", "number"]),
        (["prune.rate=[0.2, 0.20]"], ["prune.rate names a rate twice", "0.2, 0.2"]),
        (["prune.rate=0.9999999"], ["prune.rate", "leaves no weight"]),
        (["prune.method=l11"], ["prune.method", "did you mean 'l1'"]),
        (["prune.scope=globl"], ["prune.scope", "did you mean 'global'? known: global, layer"]),
        (["prune.label=a/b"], ["prune.label"]),
        (["prune.finetune.epochs=-1"], ["prune.finetune.epochs"]),
        (["prune.rates=0.1"], ["did you mean 'prune.rate'"]),
        (["probe.kind=softmax"], ["probe.kind=softmax reads pixels"]),
        (["probe.kind=knn", "probe.knn.k=73"], ["probe.knn.k=73"]),
        (["optim.lr=3"], ["other settings", "optim.lr"]),
        (
            ["prune.finetune.epochs=1", "train.compile=true", "train.activation_checkpointing=true"],
            ["train.activation_checkpointing", "use one of them"],
        ),
    ],
)
def test_mistakes_exit_with_2_one_line_and_nothing_pruned(capsys, whole, arguments, parts):
    before = (whole / "results.json").read_bytes()
    code, out, err = run(capsys, "prune", whole, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in parts:
        assert part in err
    assert not (whole / "pruned").exists()
    assert (whole / "results.json").read_bytes() == before


def test_a_folder_without_an_encoder_is_an_error(capsys, tmp_path):
    code, _, err = run(capsys, "prune", tmp_path)
    assert (code, "not a run folder" in err) == (2, True)
    assert run(capsys, "run", "default", *FAST, "probe.kind=softmax", f"run_dir={tmp_path / 'pixels'}")[0] == 0
    code, _, err = run(capsys, "prune", tmp_path / "pixels", "probe.kind=knn")
    assert (code, "no encoder in this run" in err, err.count("\n")) == (2, True, 1)


def test_a_used_folder_needs_resume_and_the_same_settings(capsys, dense):
    assert run(capsys, "prune", dense, "prune.rate=0.5")[0] == 0
    code, _, err = run(capsys, "prune", dense, "prune.rate=[0.4, 0.5]")
    assert (code, err.count("\n")) == (2, 1)
    assert "l1-global-0.5: pruned already" in err
    assert not (dense / "pruned/l1-global-0.4").exists(), "checked before the first rate is pruned"
    code, _, err = run(capsys, "prune", dense, "prune.rate=0.5", "prune.finetune.epochs=1", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "prune.finetune.epochs: 0 -> 1" in err
    code, _, err = run(capsys, "prune", dense, "prune.rate=[0.4, 0.5]", "--resume")
    assert code == 0, err
    assert [e["prune"]["rate"] for e in results_of(dense)] == [0.4, 0.5]


def _different_masks(rank, world_size, folder):
    masks = {"w": torch.tensor([True, rank != 1, False])}
    with pytest.raises(RunFolderError) as raised:
        check_same_masks(folder, {0.5: masks})
    return str(raised.value)


def test_ranks_with_different_masks_all_raise(tmp_path):
    first, second = run_ranks(_different_masks, 2, tmp_path)
    assert first == second
    assert "ranks 1 read other weights" in first
