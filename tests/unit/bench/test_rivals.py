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
        assert len(found.cells) == len(methods) * (len(rivals.RATES) if grid.tuning else seeds)
        configs = [node.resolved.config for node in found.nodes.values()]
        assert {c.seed for c in configs} == ({rivals.TUNING_SEED} if grid.tuning else set(range(seeds)))
        assert {c.optim.lr for c in configs} == (set(rivals.RATES) if grid.tuning else {0.5})
        shared = [
            {**c.model_dump(exclude=free), "seed": 0, "optim": c.optim.model_dump(exclude={"lr"})} for c in configs
        ]
        assert all(one == shared[0] for one in shared)
        assert len({(c.model.encoder, c.model.projection_hidden) for c in configs}) == 1


def test_the_learning_rate_is_the_best_of_validation_and_only_of_complete_tunings(rivals, monkeypatch):
    grid = rivals.Grid(data_sets(rivals)[0], "labels", tuning=False)
    asked = []

    def accuracies(of, root, split):
        asked.append((of.tuning, split))
        scores = {
            ("TCL", f"{rate}"): {100: accuracy} for rate, accuracy in zip(rivals.RATES, (0.3, 0.9, 0.5), strict=True)
        }
        return {**scores, ("SupCon out", f"{rivals.RATES[0]}"): {100: 0.99}}

    monkeypatch.setattr(rivals, "accuracies", accuracies)
    assert rivals.chosen_rates(grid, None) == {"TCL": rivals.RATES[1]}
    assert asked == [(True, "validation")]


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
        return {(name, ""): test[name] for name in rivals.GROUPS[grid.group][1] if name in test}

    monkeypatch.setattr(rivals, "accuracies", accuracies)
    monkeypatch.setattr(rivals, "chosen_rates", lambda grid, root: dict.fromkeys(test, 1e-3))
    found = rivals.result(data, None)
    assert list(found["methods"]) == ["TCL", "SupCon out", "SimCLR"]
    # accuracies of the seeds differ by 0.2, the pairs by 0.01 each
    first = found["differences"][0]
    assert (first["from"], first["to"]) == ("SupCon out", "TCL")
    assert first["difference"] == (pytest.approx(0.01), pytest.approx(0, abs=1e-9), 3)
    text = rivals.markdown([found])
    assert "| TCL | 0.7000 ± 0.2484 | 3 | 0.001 (the last one tried) |" in text
    assert "| TCL - SupCon out | +0.0100 ± 0.0000 | 3 | above |" in text
    assert "| SupCon out - SimCLR | +0.2900 ± 0.0000 | 2 | above |" in text
