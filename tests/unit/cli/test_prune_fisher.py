"""`hpc-supcon prune` with obs_diag, obs_block and fishleg: what is changed, kept, carried on, resumed and refused."""

from __future__ import annotations

import shutil

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fisher_task import KeptFisher
from hpc_supcon.pruning import InverseFisher, prunable
from tests.commands import run, succeed
from tests.unit.cli.test_prune import FAST, results_of

QUICK = ["probe.kind=knn", "prune.fisher={steps: 25, samples: 32, batches: 4}"]


def trained(folder, *settings):
    succeed("run", "default", *FAST, "probe.kind=knn", *settings, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("contrastive") / "r", "loss.name=supcon_out")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("classifier") / "r", "loss.name=cross_entropy",
                   "loss.learnable_temperature=false")  # fmt: skip


@pytest.fixture(params=["contrastive", "classifier"])
def dense(request, tmp_path):
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / request.param)


def prune(capsys, folder, *settings, code=0):
    found, out, err = run(capsys, "prune", folder, *QUICK, *settings)
    assert found == code, err
    return results_of(folder) if (folder / "results.json").exists() else [], out, err


def parameters_of(folder):
    return {name: p.detach() for name, p in load_model(folder)[0].encoder.named_parameters()}


@pytest.mark.parametrize("method", ["obs_diag", "obs_block", "fishleg"])
def test_the_weights_that_are_left_are_changed_to_compensate(capsys, dense, method):
    entries, _, err = prune(capsys, dense, f"prune.method={method}", "prune.rate=[0.5, 0.8]")
    assert "damping" in err
    assert " MB" in err
    before = parameters_of(dense)
    pruned = prunable(load_model(dense)[0].encoder)
    for entry in entries:
        after = parameters_of(dense / entry["folder"])
        assert entry["prune"]["zeros"] == round(entry["prune"]["rate"] * entry["prune"]["weights"])
        assert entry["prune"]["loss"] == "run"
        changed = {name for name, p in after.items() if ((p != before[name]) & (p != 0)).any()}
        assert all(torch.isfinite(p).all() for p in after.values())
        assert bool(changed) is (method != "obs_diag")
        assert changed <= (set(before) if method == "fishleg" else set(pruned))


def test_two_of_four_and_the_loss_of_a_linear_probe(capsys, contrastive, tmp_path):
    dense = shutil.copytree(contrastive, tmp_path / "r")
    entries, _, _ = prune(
        capsys, dense, "prune.method=fishleg", "prune.scope=2:4", "prune.loss=cross_entropy", "probe.linear.epochs=1"
    )
    for name, weight in prunable(load_model(dense / entries[0]["folder"])[0].encoder).items():
        if weight.shape[1] % 4 == 0:
            assert ((weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all(), name


def test_an_interrupted_estimate_goes_on_bit_for_bit_and_a_whole_one_is_used_again(
    capsys, contrastive, tmp_path, monkeypatch
):
    dense = shutil.copytree(contrastive, tmp_path / "r")
    whole = shutil.copytree(dense, tmp_path / "whole")
    prune(capsys, whole, "prune.method=fishleg", "prune.rate=0.6")
    save = KeptFisher.save

    def stop(kept, step, state):
        save(kept, step, state)
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptFisher, "save", stop)
    prune(capsys, dense, "prune.method=fishleg", "prune.rate=0.6", code=130)
    monkeypatch.undo()
    (kept,) = (dense / "sensitivity").glob("fisher-*")
    assert checkpoint.list_steps(kept) == [20]
    _, _, err = prune(capsys, dense, "prune.method=fishleg", "prune.rate=0.6")
    assert "20 of 25 steps done" in err
    want, got = (parameters_of(folder / "pruned/fishleg-global-0.6") for folder in (whole, dense))
    assert all(torch.equal(p, got[name]) for name, p in want.items())

    monkeypatch.setattr(InverseFisher, "_loss", None)  # no step is taken
    _, _, err = prune(capsys, dense, "prune.method=fishleg", "prune.rate=0.7")
    assert "25 of 25 steps done" in err
    monkeypatch.undo()
    (kept / "step-25/fisher.safetensors").write_bytes(b"damaged")
    _, _, err = prune(capsys, dense, "prune.method=fishleg", "prune.rate=0.8")
    assert "estimated again" in err
    assert "0 of 25 steps done" in err
    prune(capsys, dense, "prune.method=fishleg", "prune.rate=0.8", "prune.fisher.damping=0.5", "prune.label=other")
    assert len(list((dense / "sensitivity").glob("fisher-*"))) == 2, "other settings are another estimate"


def test_rounds_carry_the_inverse_on_and_resume_to_the_same_weights(capsys, contrastive, tmp_path):
    dense = shutil.copytree(contrastive, tmp_path / "r")
    rounds = ["prune.method=fishleg", "prune.schedule=iterative", "prune.rate=[0.4, 0.7]",
              "prune.finetune.iterations=2"]  # fmt: skip
    entries, _, err = prune(capsys, dense, *rounds)
    assert "0 of 25 steps done" in err
    assert "0 of 13 steps done" in err
    last = dense / entries[-1]["folder"]
    assert entries[-1]["prune"]["zeros"] == round(0.7 * entries[-1]["prune"]["weights"])
    want = parameters_of(last)
    first, second = (prunable(load_model(dense / e["folder"])[0].encoder) for e in entries)
    assert all((second[name][weight == 0] == 0).all() for name, weight in first.items())
    shutil.rmtree(last)
    _, _, err = prune(capsys, dense, *rounds, "--resume")
    assert "13 of 13 steps done" in err
    assert all(torch.equal(p, want[name]) for name, p in parameters_of(last).items())
