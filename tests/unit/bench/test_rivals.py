"""benchmarks/rivals.py: how a learning rate is chosen and what is said of a difference."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from hpc_supcon.config import yaml12
from hpc_supcon.grid.cells import load
from hpc_supcon.grid.expand import expand


@pytest.fixture
def rivals(request, monkeypatch):
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("rivals", folder / "rivals.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rivals", module)
    spec.loader.exec_module(module)
    return module


def data_sets(rivals):
    return rivals.data_sets(type("Arguments", (), {"cifar10": "/images", "mnist": "/mnist"}))


def plan(rivals, grid, folder):
    rates = dict.fromkeys(rivals.GROUPS[grid.group][1], 0.5)
    path = folder / "g.yaml"
    path.write_text(yaml12.dumps(grid.specification(rates, "fp32")), encoding="utf-8")
    return expand(load(path))


def test_every_grid_expands_and_methods_share_all_but_their_loss_and_head(rivals, tmp_path):
    free = {"loss", "model", "name", "run_dir"}
    for grid in rivals.grids(data_sets(rivals)):
        found = plan(rivals, grid, tmp_path)
        seeds, methods = rivals.GROUPS[grid.group]
        tuning = grid.stage != "runs"
        assert len(found.cells) == len(methods) * (len(grid.rates) if tuning else seeds)
        configs = [node.resolved.config for node in found.nodes.values()]
        assert {c.seed for c in configs} == ({rivals.TUNING_SEED} if tuning else set(range(seeds)))
        assert {c.optim.lr for c in configs} == (set(grid.rates) if tuning else {0.5})
        shared = [
            {**c.model_dump(exclude=free), "seed": 0, "optim": c.optim.model_dump(exclude={"lr"})} for c in configs
        ]
        assert all(one == shared[0] for one in shared)
        assert len({(c.model.encoder, c.model.projection_hidden) for c in configs}) == 1


@pytest.fixture
def tuned(rivals, monkeypatch):
    """Sets what the stages of tuning have found: stage -> method -> learning rate -> accuracy."""
    found = {}

    def accuracies(grid, root, split):
        if split == "test":  # rates are never chosen by it
            return {(str(n), ""): {0: 0.0} for n in range(sum(len(of) for of in found.get(grid.stage, {}).values()))}
        return {
            (method, f"{rate:g}"): {rivals.TUNING_SEED: accuracy}
            for method, scores in found.get(grid.stage, {}).items()
            for rate, accuracy in scores.items()
        }

    monkeypatch.setattr(rivals, "accuracies", accuracies)
    return found


def test_the_learning_rate_is_the_best_of_validation_and_two_more_are_tried_beyond_an_end(rivals, tuned):
    grid = rivals.Grid(data_sets(rivals)[0], "labels", "tuning")
    chosen = {stage: (lambda stage=stage: rivals.methods_of(grid.of(stage), None)) for stage in rivals.STAGES}
    assert list(chosen["tuning"]()) == list(rivals.GROUPS["labels"][1])
    assert not any(chosen[stage]() for stage in ("lower", "higher", "runs"))
    low, middle, high = rivals.RATES
    tuned["tuning"] = {
        "TCL": {low: 0.3, middle: 0.9, high: 0.5},
        "SupCon out": {low: 0.9, middle: 0.8, high: 0.7},
        "SupCon in": {low: 0.1, middle: 0.2, high: 0.3},
        "cross-entropy": {low: 0.99, middle: 0.5},  # not tuned at all of them: neither chosen nor at an end
    }
    assert chosen["lower"]() == {"SupCon out": low}
    assert chosen["higher"]() == {"SupCon in": high}
    assert chosen["runs"]() == {"TCL": middle, "SupCon out": low, "SupCon in": high}
    tuned["lower"] = {"SupCon out": {1e-4: 0.4, 3e-4: 0.95}}
    tuned["higher"] = {"SupCon in": {3e-2: 0.1, 1e-1: 0.2}}
    assert chosen["lower"]() == {"SupCon out": low}, "what a stage runs does not depend on what it finds"
    assert chosen["runs"]() == {"TCL": middle, "SupCon out": 3e-4, "SupCon in": high}


def test_what_is_left_counts_the_rates_beyond_the_ends(rivals, tuned):
    sets = data_sets(rivals)[:1]
    assert rivals.left(sets, ["labels"], None) == [
        "left: 12 of 12 runs of rivals-cifar-10-labels-tuning",
        "left: 20 of 20 runs of rivals-cifar-10-labels",
    ]
    scores = dict(zip(rivals.RATES, (0.3, 0.4, 0.5), strict=True))
    tuned["tuning"] = dict.fromkeys(rivals.GROUPS["labels"][1], scores)
    tuned["higher"] = {"TCL": {3e-2: 0.1}}
    assert rivals.left(sets, ["labels"], None)[0] == "left: 7 of 8 runs of rivals-cifar-10-labels-tuning-higher"


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.02, 0.01, 5), "above"),
        ((-0.02, 0.01, 5), "below"),
        ((0.02, 0.03, 5), "not separated"),
        ((0.02, 0.0, 1), "too few seeds"),
        (None, "too few seeds"),
    ],
)
def test_a_difference_counts_where_its_interval_leaves_out_zero(rivals, difference, said):
    assert rivals.verdict(difference) == said


def test_the_report_compares_pairs_of_one_seed(rivals, monkeypatch):
    data = data_sets(rivals)[1]
    test = {
        "TCL": {0: 0.80, 1: 0.70, 2: 0.60},
        "SupCon out": {0: 0.79, 1: 0.69, 2: 0.59},
        "SimCLR": {0: 0.5, 1: 0.4},
    }

    def accuracies(grid, root, split):
        names = [name for name in rivals.GROUPS[grid.group][1] if name in test]
        if grid.stage == "runs":
            return {(name, ""): test[name] for name in names}
        return {(name, f"{rate:g}"): {rivals.TUNING_SEED: rate * 5} for name in names for rate in grid.rates}

    monkeypatch.setattr(rivals, "accuracies", accuracies)
    monkeypatch.setattr(rivals, "methods_of", lambda grid, root: dict.fromkeys(test, 1e-1))
    found = rivals.result(data, None)
    assert list(found["methods"]) == ["TCL", "SupCon out", "SimCLR"]
    tried = pytest.approx({rate: rate * 5 for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)})
    assert [row["tuning"] for row in found["methods"].values()] == [tried] * 3
    # accuracies of the seeds differ by 0.2, the pairs by 0.01 each
    first = found["differences"][0]
    assert (first["from"], first["to"]) == ("SupCon out", "TCL")
    assert first["difference"] == (pytest.approx(0.01), pytest.approx(0, abs=1e-9), 3)
    text = rivals.markdown([found])
    assert "| TCL | 0.7000 ± 0.2484 | 3 | 0.1 (the last one tried) |" in text
    assert "| TCL - SupCon out | +0.0100 ± 0.0000 | 3 | above |" in text
    assert "| SupCon out - SimCLR | +0.2900 ± 0.0000 | 2 | above |" in text
