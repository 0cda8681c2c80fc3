"""The grids repeat published tables and figures. The axes below were typed from the papers, not from the grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.grid.cells import load as load_grid
from hpc_supcon.grid.expand import expand
from tests.unit.config.test_recipes import STABILITY

GRIDS = Path(__file__).parents[3] / "launch/grids"


@pytest.fixture(scope="module")
def grid():
    """name -> [(labels of a cell without its seed, its configuration)], and the number of seeds."""

    def read(name):
        plan = expand(load_grid(GRIDS / f"{name}.yaml"))
        cells = {}
        for cell in plan.cells:
            labels = tuple(sorted((axis, label) for axis, label in cell.labels.items() if axis != "seed"))
            cells.setdefault(labels, []).append(plan.nodes[cell.nodes[-1]].resolved.config)
        seeds = {len(configs) for configs in cells.values()}
        assert len(seeds) == 1
        return [(dict(labels), configs[0]) for labels, configs in cells.items()], seeds.pop()

    return read


def rows_of(config):
    return config.data.batch_size * config.data.views


def losses(cells, *keys):
    """{(label of each key): {loss name: configuration}}"""
    found = {}
    for labels, config in cells:
        found.setdefault(tuple(labels[key] for key in keys), {})[config.loss.name] = config
    return found


def test_batch_sizes(grid):
    cells, _ = grid("tcl-batch")
    found = losses(cells, "rows")
    assert [int(label) for (label,) in found] == list(STABILITY)
    for (label,), pair in found.items():
        assert set(pair) == {"tcl", "supcon_out"}
        for config in pair.values():
            assert (rows_of(config), config.data.source, config.model.encoder) == (int(label), "cifar100", "resnet50")
            assert (config.optim.lr, config.loss.k1) == STABILITY[int(label)]
            assert (config.train.epochs, config.probe.linear.epochs) == (100, 50)


def check_stability(config):
    """What the experiments on encoders, projections and augmentation share."""
    assert (rows_of(config), config.data.source) == (128, "cifar100")
    assert config.loss.k1 == 5000
    assert config.probe.linear.epochs == 50


def test_encoders(grid):
    found = losses(grid("tcl-encoders")[0], "encoder")
    hidden = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}
    assert [label for (label,) in found] == list(hidden)
    for (label,), pair in found.items():
        assert set(pair) == {"tcl", "supcon_out"}
        for config in pair.values():
            check_stability(config)
            assert (config.model.encoder, config.model.projection_hidden) == (label, hidden[label])
            assert (config.optim.lr, config.train.epochs) == (0.09 if label == "resnet101" else 0.1, 100)


def test_projection_sizes(grid):
    found = losses(grid("tcl-projection")[0], "model.projection_dim")
    assert [int(label) for (label,) in found] == [64, 128, 256, 512, 1024, 2048]
    for (label,), pair in found.items():
        for config in pair.values():
            check_stability(config)
            assert (config.model.projection_dim, config.model.encoder) == (int(label), "resnet50")
            assert (config.optim.lr, config.train.epochs) == (0.1, 100)


def test_augmentation(grid):
    found = losses(grid("tcl-augment")[0], "augment")
    for (label,), pair in found.items():
        for config in pair.values():
            check_stability(config)
            assert (config.model.encoder, config.optim.lr) == ("resnet50", 0.1)
        tcl = pair["tcl"]
        sim = label == "SimAugment"
        assert tcl.augment.policy == ("simaugment" if sim else "autoaugment")
        assert (tcl.loss.k2, tcl.train.epochs, tcl.augment.blur) == (1.2 if sim else 1, 200 if sim else 100, 0)
        assert tcl.augment.is_padded != sim


def test_k1(grid):
    cells, _ = grid("tcl-k1")
    pairs = {(config.loss.k1, config.loss.k2) for _, config in cells}
    assert {(k1, 1.0) for k1 in (2000, 4000, 5000, 6000, 8000, 50_000)} < pairs
    assert {pair for pair in pairs if pair[1] != 1} == {(50_000, 3.25)}
    assert all((config.data.source, config.model.encoder) == ("cifar100", "resnet50") for _, config in cells)


@pytest.mark.parametrize(
    ("name", "epochs", "columns"),
    [
        ("tcl-datasets", 100, {"cross_entropy", "supcon_out", "tcl"}),
        ("tcl-datasets-250", 200, {"supcon_out", "tcl"}),
    ],
)
def test_data_sets(grid, name, epochs, columns):
    found = losses(grid(name)[0], "data")
    assert [label for (label,) in found] == ["cifar10", "cifar100", "fmnist", "imagenet100"]
    for (label,), by_loss in found.items():
        assert set(by_loss) == columns
        for loss, config in by_loss.items():
            recipe = {"cross_entropy": "ce", "supcon_out": "supcon", "tcl": "tcl"}[loss]
            published = load_config(f"{recipe}-{label}")
            assert config.train.epochs == epochs
            assert (config.optim, config.augment, config.loss) == (published.optim, published.augment, published.loss)


def test_interval(grid):
    cells, seeds = grid("tcl-interval")
    assert seeds == 30
    assert {config.loss.name for _, config in cells} == {"supcon_out", "tcl"}
    for _, config in cells:
        check_stability(config)
        assert (config.optim.lr, config.model.encoder, config.train.epochs) == (0.1, "resnet50", 100)


RIVALS = {
    "MoCo v2": "moco-v2",
    "BYOL": "byol",
    "SimSiam": "simsiam",
    "Barlow Twins": "barlow-twins",
    "VICReg": "vicreg",
    "SwAV": "swav",
    "DINO": "dino",
}


def test_rivals_without_labels(grid):
    cells, _ = grid("selfsup")
    found = {(labels["data"], labels["method"]): config for labels, config in cells if labels["method"] in RIVALS}
    assert set(found) == {(data, method) for data in ("cifar10", "cifar100") for method in RIVALS}
    for (data, method), config in found.items():
        recipe = load_config(f"{RIVALS[method]}-cifar10")
        assert (config.loss, config.optim, config.model) == (recipe.loss, recipe.optim, recipe.model)
        assert (config.data.source, config.train.epochs) == (data, 1000)


def test_without_labels(grid):
    cells, _ = grid("selfsup")
    by_method = {(labels["data"], labels["method"]): config for labels, config in cells}
    by_method = {key: config for key, config in by_method.items() if key[1] not in RIVALS}
    assert {data for data, _ in by_method} == {"cifar10", "cifar100", "imagenet100"}
    for (data, method), config in by_method.items():
        assert config.data.source == ("image_folder" if data == "imagenet100" else data)
        assert config.model.encoder == "resnet18"
        assert config.data.batch_size == 256
        if method == "TCL with labels":
            assert (config.loss.supervised, config.model.projection_dim, config.optim.name) == (True, 128, "sgd")
        else:
            assert not config.loss.supervised or config.loss.name == "simclr"
            assert (config.model.projection_dim, config.train.epochs) == (256, 400 if data == "imagenet100" else 1000)
    assert {config.data.views for (_, method), config in by_method.items() if method != "SimCLR"} == {3}


def test_both_responses_are_logged(grid):
    cells, _ = grid("tcl-response")
    assert {config.loss.name for _, config in cells} == {"supcon_out", "tcl"}
    assert all(config.log.gradient_response for _, config in cells)


def test_the_deck(grid):
    encoders = ["resnet50", "densenet201", "inception_v3", "inception_resnet_v2", "densenet169"]
    found = losses(grid("deck")[0], "model.encoder")
    assert [label for (label,) in found] == encoders
    assert all(set(by_loss) == {"cross_entropy", "supcon_in", "supcon_out"} for by_loss in found.values())
    cells, _ = grid("deck-pruning")
    assert {labels["prune.rate"] for labels, _ in cells} == {"null", "0.2", "0.4", "0.5"}


def test_latent_spaces(grid):
    found = {(labels["method"], labels["data"]): config for labels, config in grid("latent")[0]}
    assert set(found) == {(m, d) for m in ("autoencoder", "guided", "supcon") for d in ("mnist", "cifar10")}
    assert {config.loss.name for (method, _), config in found.items() if method == "guided"} == {"cross_entropy_mae"}


def test_triplets(grid):
    cells, _ = grid("triplet")
    assert {(config.model.out_dim, config.probe.kind) for _, config in cells} == {
        (z, kind) for z in (32, 64) for kind in ("linear", "finetune")
    }


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_expands_and_has_a_small_twin(path):
    assert expand(load_grid(path)).cells
    if not path.stem.endswith("-small"):
        assert path.with_name(f"{path.stem}-small.yaml").exists()


def test_encoders_under_the_same_pruning(grid):
    """Losses whose encoders are compared (arXiv 2207.00200), each pruned by every method to every rate."""
    cells, seeds = grid("pruning")
    assert seeds == 3
    methods = {config.prune.method for _, config in cells}
    assert methods == {"random", "l1", "lamp", "obs_diag", "obs_block", "fishleg"}
    assert {labels["prune.rate"] for labels, _ in cells} == {
        "0", "0.2", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95",
    }  # fmt: skip
    by_loss = losses(cells, "model.encoder", "method", "prune.rate")
    assert all(set(found) == {"cross_entropy", "supcon_in", "supcon_out"} for found in by_loss.values())
    assert all(config.prune.finetune.epochs == 0 and config.prune.loss == "run" for _, config in cells)
