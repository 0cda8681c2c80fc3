"""The recipes say what was published. The numbers below were typed from the papers, not from the recipes."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from hpc_supcon import config as cfg
from hpc_supcon.models import build_encoder

FOLDER = resources.files("hpc_supcon.config") / "recipes"
OWN = {"default", "quickstart", "mnist", "cifar10-folder"}
PUBLISHED = [name for name in cfg.recipe_names() if name not in OWN]
FULL = [name for name in PUBLISHED if not name.endswith("-small")]
DATA_SETS = {
    # data set: (source, batch, learning rate of TCL and of SupCon, k1, policy, encoder, hidden width)
    "cifar10": ("cifar10", 128, (0.1, 0.1), 5000, "autoaugment", "resnet50", 2048),
    "cifar100": ("cifar100", 256, (0.2, 0.2), 4000, "autoaugment", "resnet50", 2048),
    "fmnist": ("fashion_mnist", 128, (0.09, 0.09), 5000, "flip_crop", "resnet50", 2048),
    "imagenet100": ("image_folder", 256, (0.3, 0.2), 4000, "autoaugment", "resnet18", 512),
}


def lines_of(name):
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


def variants_of(name):
    """The overrides that a recipe's comments offer: `#   key=value key=value   remark`."""
    found = (re.findall(r"(?<= )[a-z_.0-9]+=\S+", line) for line in lines_of(name) if re.match(r"#   \S+=", line))
    return [list(overrides) for overrides in found]


def test_the_list_is_complete():
    want = {"deck-supcon", "deck-ce", "assignment-triplet", "tcl-selfsup-cifar10", "tcl-selfsup-cifar100"}
    want |= {f"{loss}-{data}" for loss in ("tcl", "supcon") for data in DATA_SETS}
    want |= {f"latent-{m}-{d}" for m in ("autoencoder", "guided", "supcon") for d in ("mnist", "cifar10")}
    assert set(FULL) == want
    assert {f"{name}-small" for name in want} == set(PUBLISHED) - want


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_short_and_resolves(name):
    assert 6 <= len(lines_of(name)) <= 25
    config = cfg.load_config(name)
    assert config.name == name
    assert cfg.load_config(name, variants_of(name)[0] if variants_of(name) else []).name == name


@pytest.mark.parametrize("name", FULL)
def test_a_small_twin_keeps_loss_and_optimizer(name):
    full, small = cfg.load_config(name), cfg.load_config(f"{name}-small")
    assert small.loss == full.loss
    assert (small.optim.name, small.augment.policy) == (full.optim.name, full.augment.policy)
    assert small.probe.kind == full.probe.kind


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("loss", ["tcl", "supcon"])
def test_tuned_contrastive_learning_and_its_supcon_twin(loss, data):
    config = cfg.load_config(f"{loss}-{data}")
    source, batch, (tcl_lr, supcon_lr), k1, policy, encoder, hidden = DATA_SETS[data]
    assert (config.data.source, config.data.batch_size, config.data.views) == (source, batch, 2)
    assert config.optim.lr == (tcl_lr if loss == "tcl" else supcon_lr)
    assert config.optim.lr_per_256 is None
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.optim.schedule, config.optim.nesterov, config.optim.warmup_epochs) == ("cosine", False, 0)
    assert config.augment.policy == policy
    assert config.augment.autoaugment == ("imagenet" if data == "imagenet100" else "cifar10")
    assert (config.model.encoder, config.model.projection_hidden, config.model.projection_dim) == (
        encoder,
        hidden,
        128,
    )
    assert config.loss.temperature == 0.1
    assert config.loss.base_temperature is None
    assert config.loss.name == ("tcl" if loss == "tcl" else "supcon_out")
    if loss == "tcl":
        assert (config.loss.k1, config.loss.k2) == (k1, 1)
    linear = config.probe.linear
    assert (config.train.epochs, config.probe.kind, linear.epochs, linear.lrs) == (100, "linear", 50, (0.5,))


def test_variants_of_tuned_contrastive_learning():
    variants = [cfg.load_config("tcl-cifar10", overrides) for overrides in variants_of("tcl-cifar10")]
    longer, deeper, sim, *sizes = variants
    assert longer.train.epochs + longer.probe.linear.epochs == 250
    assert (deeper.model.encoder, deeper.optim.lr) == ("resnet101", 0.09)
    assert (sim.augment.policy, sim.augment.blur, sim.loss.k1, sim.loss.k2) == ("simaugment", 0, 5000, 1.2)
    assert sim.train.epochs + sim.probe.linear.epochs == 250
    table = [(config.data.batch_size, config.optim.lr, config.loss.k1) for config in sizes]
    assert table == [
        (32, 8e-3, 5000), (64, 9e-3, 7500), (128, 0.1, 5000), (256, 0.2, 4000), (512, 0.5, 4000), (1024, 1, 4000),
    ]  # fmt: skip


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_self_supervised_tuned_contrastive_learning(data):
    config = cfg.load_config(f"tcl-selfsup-{data}")
    assert (config.loss.name, config.loss.supervised, config.loss.k1, config.loss.k2) == ("tcl", False, 1, 1.5)
    assert (config.data.source, config.data.views, config.data.batch_size) == (data, 3, 256)
    assert (config.optim.name, config.optim.lr, config.train.epochs) == ("lars", 0.5, 1000)
    assert (config.model.encoder, config.model.projection_hidden, config.model.projection_dim) == (
        "resnet18", 2048, 256,
    )  # fmt: skip
    assert config.augment.blur > 0
    assert config.probe.linear.epochs == 100


def test_the_deck_compares_losses_on_one_trunk():
    supcon, ce = cfg.load_config("deck-supcon"), cfg.load_config("deck-ce")
    changed = {line.split(":")[0] for line in cfg.differences(supcon, ce)}
    assert changed == {"loss.name"}
    assert (supcon.loss.name, ce.loss.name) == ("supcon_in", "cross_entropy")
    assert supcon.model.encoder == "densenet201"
    for encoder in ("resnet50", "densenet201", "inception_v3", "inception_resnet_v2", "densenet169"):
        build_encoder(
            encoder, image_size=cfg.load_config("deck-supcon", [f"model.encoder={encoder}"]).data.image_size
        )


def test_the_triplet_assignment():
    config = cfg.load_config("assignment-triplet")
    assert (config.model.encoder, config.model.out_dim, config.data.batch_size) == ("vgg16_bn_embed", 64, 2048)
    assert (config.loss.name, config.loss.margin, config.loss.squared) == ("triplet", 1, True)
    assert (config.loss.mining, config.train.iterations, config.log.every_steps) == ("random", 2000, 10)
    assert config.probe.kinds == ("linear", "finetune", "softmax")
    probe = config.probe
    assert (probe.linear.batch_size, probe.linear.lrs, probe.linear.iterations) == (2048, (1e-4,), 4000)
    assert (probe.linear.stopping.patience, probe.finetune.stopping.patience) == (300, 10)
    softmax = probe.softmax
    assert (softmax.lr, softmax.l2_lambda, softmax.clip_norm, softmax.stopping.patience) == (1e-4, 0.2, 5.0, 50)
    assert (softmax.batch_size, softmax.iterations) == (256, 3000)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_latent_spaces(data):
    autoencoder, guided, supcon = (
        cfg.load_config(f"latent-{method}-{data}") for method in ("autoencoder", "guided", "supcon")
    )
    assert (autoencoder.loss.name, autoencoder.loss.alpha, autoencoder.probe.kind) == ("reconstruction", 0.5, "mlp")
    assert len(autoencoder.probe.mlp.hidden) == 2  # and the output layer: three
    assert autoencoder.probe.mlp.batch_norm
    assert autoencoder.probe.mlp.dropout > 0
    assert (guided.loss.name, guided.train.epochs) == ("cross_entropy_mae", 10)
    for config in (autoencoder, guided):
        assert (config.model.encoder, config.model.out_dim) == ("conv", 128)
    assert (supcon.loss.name, supcon.data.views, supcon.model.encoder) == ("supcon_out", 2, "resnet18")
    assert supcon.optim.schedule == "cosine"
    assert {c.data.source for c in (autoencoder, guided, supcon)} == {data}
