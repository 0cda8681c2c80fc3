"""Pruning on two ranks: equal masks on both, and fine-tuning that was killed resumes bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.prune_task import prune_task
from hpc_supcon.pruning import PRUNERS, PrunerSpec, build_masks, prunable, score_weights
from hpc_supcon.run_folder import read_config
from hpc_supcon.stages import pretrain
from hpc_supcon.stages.prune import prune
from hpc_supcon.training.checkpointer import Checkpointer
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks
from tests.unit.pruning.test_pruning import assert_pruned, torch_masks

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.iterations=4", "data.validation_fraction=0.2",
    "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "checkpoint.asynchronous=false",
    "log.progress=false", "log.tensorboard=false", "train.precision=fp32", "train.ema=0.9", "optim.weight_decay=0.01",
    "probe.kind=[knn, finetune]", "probe.knn.k=5", "probe.finetune.epochs=1", "probe.finetune.batch_size=16",
]  # fmt: skip
STEPS = 24


def stage(rank, world_size, folder, label=None, resume=False, kill_at=None, more=()):
    """The dense run without a label, else a pruning; every rank kills itself after saving step `kill_at`."""
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    if label is None:
        config = load_config("default", [*SETTINGS, f"run_dir={folder}"])
        pretrain.pretrain(config, runtime, load_data(config, runtime))
        return None
    tune = ["prune.rate=[0.7, 0.3]", f"prune.finetune.iterations={STEPS}", f"prune.label={label}", *more]
    config = read_config(folder, tune)
    save = Checkpointer.save

    def save_and_die(checkpointer, state):
        save(checkpointer, state)
        if state.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpointer.save = save_and_die
    return prune(folder, config, runtime, load_data(config, runtime), resume=resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dense run of two ranks, which tests copy."""
    folder = tmp_path_factory.mktemp("trained") / "dense"
    run_ranks(stage, 2, folder)
    return folder


@pytest.fixture
def dense(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "dense")


def test_two_ranks_prune_the_same_weights_and_killed_fine_tuning_resumes_bit_for_bit(dense):
    first, second = run_ranks(stage, 2, dense, "whole")
    assert first[0]["test"] == second[0]["test"]
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(stage, 2, dense, "killed", False, 14)
    assert checkpoint.list_steps(dense / "pruned/l1-global-0.7-killed/checkpoints")[-1] == 14
    run_ranks(stage, 2, dense, "killed", True)
    for rate in (0.7, 0.3):
        whole, killed = (
            checkpoint.load_checkpoint(dense / f"pruned/l1-global-{rate}-{label}/checkpoints/step-{STEPS}")
            for label in ("whole", "killed")
        )
        assert whole.tensors.keys() == killed.tensors.keys() >= {"model", "ema", "masks", "optimizer"}
        for part, named in whole.tensors.items():
            for name, tensor in named.items():
                assert torch.equal(killed.tensors[part][name], tensor), (part, name)
        masks = torch_masks(load_model(dense)[0].encoder, rate, "global")
        assert_pruned(killed.tensors["model"], masks)
        assert_pruned(killed.tensors["ema"], masks)


GRADUAL = [
    "prune.schedule=gradual",
    "prune.steps=5",
    "prune.interval=4",
    "prune.rate=0.8",
    "prune.method=l1_weighted",
    "probe.kind=knn",
]


def test_gradual_pruning_of_two_ranks_that_was_killed_resumes_with_the_same_masks_bit_for_bit(dense):
    run_ranks(stage, 2, dense, "whole", False, None, GRADUAL)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(stage, 2, dense, "killed", False, 14, GRADUAL)  # between the prunings after steps 12 and 16
    run_ranks(stage, 2, dense, "killed", True, None, GRADUAL)
    whole, killed = (
        checkpoint.load_checkpoint(dense / f"pruned/l1_weighted-global-0.8-gradual-{label}/checkpoints/step-{STEPS}")
        for label in ("whole", "killed")
    )
    for part, named in whole.tensors.items():
        for name, tensor in named.items():
            assert torch.equal(killed.tensors[part][name], tensor), (part, name)
    weights = {name: whole.tensors["model"][f"encoder.{name}"] for name in whole.tensors["masks"]}
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == round(0.8 * sum(weight.numel() for weight in weights.values()))


def test_two_ranks_scan_and_choose_the_same_rates(trained, tmp_path):
    """Cross-entropy of the linear probe on validation: equal on any number of ranks, and so are the layers' rates."""
    scan = ["prune.method=layer_sensitive", "prune.loss=cross_entropy", "prune.rate=0.6",
            "prune.finetune.iterations=null",
            "prune.scan.rates=[0.5, 0.9]", "probe.linear.epochs=3", "probe.kind=knn"]  # fmt: skip
    found = []
    for ranks in (1, 2):
        dense = shutil.copytree(trained, tmp_path / f"of {ranks}")
        results = run_ranks(stage, ranks, dense, "scan", False, None, scan)
        (path,) = (dense / "sensitivity").glob("*.json")
        found.append((json.loads(path.read_text())["cells"], results[0][0]["prune"]["rates"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], abs=0.02)


def gradients(rank, world_size, folder):
    """Of three global batches, as a method gets them that needs gradients."""
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    PRUNERS["l1"] = PrunerSpec(PRUNERS["l1"].score, needs="gradients")
    config = read_config(folder)
    model, found = load_model(folder)
    with prune_task(folder, config, runtime, load_data(config, runtime), model, found) as task:
        first = list(task.gradients(2))
        later, again = task.batches(9), task.batches(1)  # of another epoch, and one that was read before
        assert not torch.equal(later[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(again, task.batches(1), strict=True))
        assert not task.model.training
        parameters = dict(task.model.named_parameters())
        assert all(parameters[f"encoder.{name}"] is weight for name, weight in task.weights.items())
        return [*first, *task.gradients(1)], {name: weight.detach() for name, weight in task.weights.items()}


def test_gradients_of_two_ranks_equal_those_of_one_process(dense):
    config = dense / "config.yaml"  # without random views, which differ between ranks
    config.write_text(config.read_text().replace("policy: simaugment", "policy: none"))
    (alone,), both = run_ranks(gradients, 1, dense), run_ranks(gradients, 2, dense)
    weights = prunable(load_model(dense)[0].encoder)
    for result in both:
        for mine, want in zip(result[0], alone[0], strict=True):
            assert mine.keys() == want.keys() == weights.keys()
            for name in want:
                assert want[name].any()
                torch.testing.assert_close(mine[name], want[name], rtol=1e-3, atol=1e-6)
    batches = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in alone[0]]
    assert not any(torch.allclose(batches[i], batches[j]) for i, j in ((0, 1), (0, 2), (1, 2))), "one batch again"
    assert all(torch.equal(alone[1][name], weight) for name, weight in weights.items()), (
        "the weights are as they were"
    )


def test_two_ranks_remove_the_same_channels_and_killed_fine_tuning_resumes_bit_for_bit(dense):
    channels = ["prune.method=channels", "prune.channels={score: taylor, batches: 2}", "prune.rate=0.5",
                "probe.kind=knn", "prune.latency.batch_sizes=[]"]  # fmt: skip
    run_ranks(stage, 2, dense, "whole", False, None, channels)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(stage, 2, dense, "killed", False, 14, channels)
    run_ranks(stage, 2, dense, "killed", True, None, channels)
    whole, killed = (
        checkpoint.load_checkpoint(dense / f"pruned/channels-global-0.5-{label}/checkpoints/step-{STEPS}")
        for label in ("whole", "killed")
    )
    assert whole.state["encoder"]["channels"] == killed.state["encoder"]["channels"] != {}
    for part, named in whole.tensors.items():
        for name, tensor in named.items():
            assert torch.equal(killed.tensors[part][name], tensor), (part, name)


def learned(rank, world_size, folder):
    """The weights that fishleg leaves on this rank, and a pruning by what was kept of it."""
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    more = ["prune.method=fishleg", "prune.fisher.steps=21", "prune.rate=0.7", "probe.kind=knn"]
    config = read_config(folder, more)
    data = load_data(config, runtime)
    model, found = load_model(folder)
    with prune_task(folder, config, runtime, data, model, found) as task:
        scored = score_weights("fishleg", task)
    masks = build_masks(scored.scores, 0.7, "global")
    return scored.compensate(masks), prune(folder, config, runtime, data)


def test_two_ranks_learn_one_inverse_and_prune_to_the_same_weights(dense):
    (first, results), (second, _) = run_ranks(learned, 2, dense)
    saved = dict(load_model(dense / results[0]["folder"])[0].encoder.named_parameters())
    assert first.keys() == second.keys() == saved.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), "ranks with different weights"
        assert torch.equal(weight, saved[name]), "what was kept is not what was learned"
    assert results[0]["prune"]["zeros"] == round(0.7 * results[0]["prune"]["weights"])
