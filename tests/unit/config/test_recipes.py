"""The recipes say what was published. The numbers below were typed from the papers, not from the recipes."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from hpc_supcon import config as cfg
from hpc_supcon.evaluation.probes.finetune import build_head
from hpc_supcon.models import build_encoder

FOLDER = resources.files("hpc_supcon.config") / "recipes"
OWN = {"default", "quickstart", "mnist", "cifar10-folder"}
PUBLISHED = [name for name in cfg.recipe_names() if name not in OWN]
FULL = [name for name in PUBLISHED if not name.endswith("-small")]
VIEWS = 2
DATA_SETS = {
    # data set: (source, rows of a batch = images x views, learning rate of TCL and of SupCon, k1, policy and crop,
    # encoder, hidden width)
    "cifar10": ("cifar10", 128, (0.1, 0.1), 5000, ("autoaugment", "padded"), "resnet50", 2048),
    "cifar100": ("cifar100", 256, (0.2, 0.2), 4000, ("autoaugment", "padded"), "resnet50", 2048),
    "fmnist": ("fashion_mnist", 128, (0.09, 0.09), 5000, ("pad_crop", "padded"), "resnet50", 2048),
    "imagenet100": ("image_folder", 256, (0.3, 0.2), 4000, ("autoaugment", "resized"), "resnet18", 512),
}
STABILITY = {
    32: (8e-3, 5000),
    64: (9e-3, 7500),
    128: (0.1, 5000),
    256: (0.2, 4000),
    512: (0.5, 4000),
    1024: (1, 4000),
}
"""Rows -> (learning rate, k1): CIFAR-100, ResNet-50."""
SELFSUP = {
    # data set: (source, epochs, hidden width of the projection)
    "cifar10": ("cifar10", 1000, 2048),
    "cifar100": ("cifar100", 1000, 2048),
    "imagenet100": ("image_folder", 400, 4096),
}

RIVALS = {
    # recipe: (loss, its weight, optimizer, learning rate, weight decay, what decays,
    # projection (hidden width, layers, norms, size), crops from, saturation, blur, solarization)
    "barlow-twins": (
        "barlow_twins",
        0.1,
        "lars",
        0.3,
        1e-4,
        "weights",
        (2048, 3, "hidden", 2048),
        0.08,
        0.2,
        0,
        (0, 0.2),
    ),
    "vicreg": ("vicreg", 1, "lars", 0.3, 1e-4, "weights", (2048, 3, "hidden", 2048), 0.2, 0.2, 0, 0.1),
    "simsiam": ("simsiam", 1, "sgd", 0.5, 1e-5, "all", (2048, 3, "all", 2048), 0.08, 0.4, 0.5, 0),
    "byol": ("byol", 1, "lars", 1.0, 1e-5, "weights", (4096, 2, "hidden", 256), 0.08, 0.2, 0, (0, 0.2)),
    "swav": ("swav", 1, "lars", 0.6, 1e-6, "weights", (2048, 2, "hidden", 128), 0.08, 0.8, 0.5, 0),
    "moco-v2": ("moco_v2", 1, "sgd", 0.3, 1e-4, "all", (2048, 2, "none", 256), 0.08, 0.4, 0.5, 0),
    "dino": ("dino", 1, "lars", 0.3, 1e-6, "weights", (2048, 3, "none", 256), 0.08, 0.2, 0, (0, 0.2)),
}
"""As in solo-learn's scripts for CIFAR-10."""


def lines_of(name):
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


def variants_of(name):
    """The overrides that a recipe's comments offer: `#   key=value key=value   remark`."""
    found = (re.findall(r"(?<= )[a-z_.0-9]+=\S+", line) for line in lines_of(name) if re.match(r"#   \S+=", line))
    return [list(overrides) for overrides in found]


def test_the_list_is_complete():
    want = {"deck-supcon", "deck-ce", "assignment-triplet", "assignment-logistic"}
    want |= {f"tcl-selfsup-{data}" for data in SELFSUP}
    want |= {f"{loss}-{data}" for loss in ("tcl", "supcon", "ce") for data in DATA_SETS}
    want |= {f"{method}-cifar10" for method in RIVALS}
    want |= {f"latent-{m}-{d}" for m in ("autoencoder", "guided", "supcon") for d in ("mnist", "cifar10")}
    assert set(FULL) == want
    assert {f"{name}-small" for name in want} == set(PUBLISHED) - want


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_short_and_resolves(name):
    assert 6 <= len(lines_of(name)) <= 32
    config = cfg.load_config(name)
    assert config.name == name
    assert cfg.load_config(name, variants_of(name)[0] if variants_of(name) else []).name == name


@pytest.mark.parametrize("name", FULL)
def test_a_small_twin_keeps_loss_and_optimizer(name):
    full, small = cfg.load_config(name), cfg.load_config(f"{name}-small")
    assert small.loss == full.loss
    assert small.optim.name == full.optim.name
    # few epochs want milder views than AutoAugment
    milder = full.augment.policy == "autoaugment" and small.data.source == "image_folder" and "cifar" in name
    assert small.augment.policy == ("pad_crop" if milder else full.augment.policy)
    assert small.probe.kind == full.probe.kind


def is_padded(config):
    return "padded" if config.augment.is_padded else "resized"


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("loss", ["tcl", "supcon", "ce"])
def test_tuned_contrastive_learning_and_what_it_is_compared_with(loss, data):
    config = cfg.load_config(f"{loss}-{data}")
    source, rows, (tcl_lr, supcon_lr), k1, (policy, crop), encoder, hidden = DATA_SETS[data]
    assert (config.data.source, config.data.batch_size * config.data.views, config.data.views) == (
        source,
        rows,
        VIEWS,
    )
    assert config.data.validation_fraction == 0
    assert config.optim.lr == (tcl_lr if loss == "tcl" else supcon_lr)
    assert config.optim.lr_per_256 is None
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.optim.schedule, config.optim.nesterov, config.optim.warmup_epochs) == ("cosine", False, 0)
    assert config.optim.decay == "all"
    assert (config.augment.policy, is_padded(config)) == (policy, crop)
    assert (config.augment.padding, config.augment.padding_mode, config.augment.flip) == (4, "zeros", 0.5)
    assert config.augment.autoaugment == "cifar10"  # in the code, for every data set
    assert (config.model.encoder, config.model.projection_hidden, config.model.projection_dim) == (
        encoder,
        hidden,
        128,
    )
    assert config.loss.temperature == 0.1
    assert config.loss.base_temperature is None
    assert config.loss.name == {"tcl": "tcl", "supcon": "supcon_out", "ce": "cross_entropy"}[loss]
    if loss == "tcl":
        assert (config.loss.k1, config.loss.k2) == (k1, 1)
    assert (config.train.epochs, config.probe.kind) == (100, "linear")
    linear = config.probe.linear
    assert (linear.input, linear.batch_size, linear.epochs, linear.lrs) == ("images", 64, 50, (0.5,))
    assert (linear.optimizer, linear.weight_decay, linear.decay, linear.schedule) == ("sgd", 1e-4, "all", "cosine")
    if data == "fmnist":
        assert config.data.image_size in (None, 28)


def test_variants_of_tuned_contrastive_learning():
    (longer,) = [cfg.load_config("tcl-cifar10", overrides) for overrides in variants_of("tcl-cifar10")]
    assert longer.train.epochs + longer.probe.linear.epochs == 250
    (larger,) = [cfg.load_config("tcl-imagenet100", overrides) for overrides in variants_of("tcl-imagenet100")]
    assert (larger.model.encoder, larger.data.batch_size * larger.data.views) == ("resnet34", 128)
    variants = [cfg.load_config("tcl-cifar100", overrides) for overrides in variants_of("tcl-cifar100")]
    *sizes, deeper, sim = variants
    table = {c.data.batch_size * c.data.views: (c.optim.lr, c.loss.k1) for c in sizes}
    assert table == STABILITY
    for config in (deeper, sim):
        assert (config.data.batch_size * config.data.views, config.loss.k1) == (128, 5000)
    assert (deeper.model.encoder, deeper.optim.lr) == ("resnet101", 0.09)
    assert (sim.augment.policy, is_padded(sim), sim.augment.blur) == ("simaugment", "resized", 0)
    assert (sim.optim.lr, sim.loss.k2, sim.train.epochs + sim.probe.linear.epochs) == (0.1, 1.2, 250)


@pytest.mark.parametrize("data", SELFSUP)
def test_self_supervised_tuned_contrastive_learning(data):
    config = cfg.load_config(f"tcl-selfsup-{data}")
    source, epochs, hidden = SELFSUP[data]
    assert (config.loss.name, config.loss.supervised, config.loss.k1, config.loss.k2) == ("tcl", False, 1, 1.5)
    assert (config.data.source, config.data.views, config.data.batch_size) == (source, 3, 256)
    optim, augment = config.optim, config.augment
    assert (optim.name, optim.lr, optim.weight_decay, config.train.epochs) == ("lars", 0.5, 1e-4, epochs)
    assert (config.model.encoder, config.model.projection_hidden, config.model.projection_dim) == (
        "resnet18", hidden, 256,
    )  # fmt: skip
    # as in solo-learn
    assert (optim.lars_eta, optim.lars_clip, optim.decay, config.loss.temperature) == (0.02, True, "weights", 0.2)
    assert (augment.crop_scale, is_padded(config)) == ((0.08, 1), "resized")
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.8, 0.8, 0.8, 0.2)
    assert augment.blur > 0
    assert (config.probe.linear.epochs, config.probe.linear.lrs) == (100, (0.5,))


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_without_labels(method):
    config = cfg.load_config(f"{method}-cifar10")
    loss, weight, optimizer, lr, weight_decay, decay, projection, crop, saturation, blur, solarize = RIVALS[method]
    model, optim, augment = config.model, config.optim, config.augment
    assert config.loss.weights == {loss: weight}
    assert (config.data.source, config.data.views, config.data.batch_size) == ("cifar10", 2, 256)
    assert (model.encoder, model.sync_bn) == ("resnet18", True)
    assert (
        model.projection_hidden,
        model.projection_layers,
        model.projection_norm,
        model.projection_dim,
    ) == projection
    assert (optim.name, optim.lr, optim.weight_decay, optim.decay) == (optimizer, lr, weight_decay, decay)
    assert (optim.momentum, optim.lars_eta, optim.lars_clip) == (0.9, 0.02, True)
    assert (optim.schedule, optim.warmup_epochs, config.train.epochs) == ("cosine", 10, 1000)
    assert (augment.policy, augment.crop_scale) == ("simaugment", (crop, 1))
    strong = loss == "swav"
    assert (augment.brightness, augment.contrast, augment.hue) == ((0.8, 0.8, 0.2) if strong else (0.4, 0.4, 0.1))
    assert augment.saturation == saturation
    assert (augment.jitter_probability, augment.grayscale, augment.blur) == (0.8, 0.2, blur)
    assert augment.solarize == solarize
    assert optim.predictor_schedule == ("constant" if loss == "simsiam" else "same")
    if loss in ("byol", "simsiam"):
        assert model.predictor_hidden == {"byol": 4096, "simsiam": 512}[loss]
    momentum = {"byol": (0.99, 1), "moco_v2": (0.99, 0.999), "dino": (0.9995, 1)}.get(loss, (None, None))
    assert (model.momentum_encoder, model.momentum_final) == momentum
    if loss == "moco_v2":
        assert (config.loss.queue_size, config.loss.temperature) == (32768, 0.2)
    if loss == "swav":
        assert (config.loss.prototypes, config.loss.temperature, config.loss.frozen_epochs) == (3000, 0.1, 2)
        assert (config.loss.sinkhorn_epsilon, config.loss.sinkhorn_iterations) == (0.05, 3)
        assert (config.loss.queue_size, config.loss.queue_start_epoch) == (3840, 50)
    if loss == "dino":
        assert (config.loss.prototypes, config.loss.temperature, config.loss.frozen_epochs) == (4096, 0.1, 1)
        teacher = config.loss.teacher_warmup_temperature, config.loss.teacher_temperature
        assert (*teacher, config.loss.teacher_warmup_epochs, config.loss.center_momentum) == (0.04, 0.07, 50, 0.9)
    assert model.projection_activation == ("gelu" if loss == "dino" else "relu")
    if loss == "vicreg":
        weights = config.loss.invariance_weight, config.loss.variance_weight, config.loss.covariance_weight
        assert weights == (25, 25, 1)
    assert config.loss.redundancy_weight == 0.005
    assert (config.probe.linear.epochs, config.probe.linear.lrs) == (100, (0.5,))


def test_variants_with_local_crops():
    (_, swav), (_, dino) = (
        [
            cfg.load_config(f"{name}-cifar10", overrides, stages=("pretrain",))
            for overrides in variants_of(f"{name}-cifar10")
        ]
        for name in ("swav", "dino")
    )
    assert swav.data.crops == dino.data.crops == (2, 6)
    # as in solo-learn's multi-crop script for CIFAR, but for the strength of the color jitter
    assert (swav.augment.crop_scale, swav.augment.local.crop_scale) == ((0.2, 1), (0.08, 0.5))
    assert (swav.augment.local.image_size, dino.augment.local.image_size) == (18, 16)


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
    assert (config.report.title, config.validation.every_steps) == ("triplet", 10)
    assert config.probe.kinds == ("linear", "finetune", "softmax")
    probe = config.probe
    assert (probe.linear.batch_size, probe.linear.lrs, probe.linear.iterations) == (2048, (1e-4,), 4000)
    # by the loss, and in iterations
    patience = {"linear": 300, "finetune": 10, "softmax": 50}
    for kind, iterations in patience.items():
        stopping = getattr(probe, kind).stopping
        assert (stopping.monitor, stopping.patience, stopping.patience_unit) == ("loss", iterations, "iterations")
        assert getattr(probe, kind).evaluate_every == 10
    softmax = probe.softmax
    assert (softmax.lr, softmax.l2_lambda, softmax.clip_norm) == (1e-4, 0.2, 5.0)
    assert (softmax.batch_size, softmax.iterations) == (256, 3000)


def test_variants_of_the_triplet_assignment():
    small, joint, figure6, table3, wide, other = (
        cfg.load_config("assignment-triplet", overrides) for overrides in variants_of("assignment-triplet")
    )
    assert small.model.out_dim == 32
    encoder = build_encoder("vgg16_bn_embed", image_size=32, out_dim=joint.model.out_dim)
    head = build_head(encoder.feature_dim, 10, hidden=joint.probe.finetune.hidden)
    assert [sum(p.numel() for p in layer.parameters()) for layer in (head[0], head[2])] == [262_656, 5_130]
    for config, patience in ((figure6, 50), (table3, 300)):
        stopping = config.train.stopping
        assert (stopping.monitor, stopping.patience, stopping.patience_unit) == ("loss", patience, "iterations")
        assert config.validation.every_steps == 10
    assert wide.probe.softmax.batch_size == 4096
    softmax = other.probe.softmax
    assert (softmax.lr, softmax.l2_lambda, softmax.stopping.patience, softmax.stopping.target) == (1e-3, 0.1, 0, 0.3)
    assert softmax.stopping.monitor == "accuracy"


def test_the_two_class_assignment():
    config = cfg.load_config("assignment-logistic")
    assert config.probe.kinds == ("logistic",)
    stopping = config.probe.logistic.stopping
    assert (stopping.monitor, stopping.target, stopping.patience) == ("accuracy", 0.8, None)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_latent_spaces(data):
    autoencoder, guided, supcon = (
        cfg.load_config(f"latent-{method}-{data}") for method in ("autoencoder", "guided", "supcon")
    )
    assert (autoencoder.loss.name, autoencoder.loss.alpha, autoencoder.probe.kind) == ("reconstruction", 0.5, "mlp")
    assert len(autoencoder.probe.mlp.hidden) == 2  # and the output layer: three
    assert autoencoder.probe.mlp.batch_norm
    assert autoencoder.probe.mlp.epochs == 25
    assert autoencoder.probe.mlp.dropout > 0
    assert (guided.loss.name, guided.train.epochs) == ("cross_entropy_mae", 10)
    for config in (autoencoder, guided):
        assert (config.model.encoder, config.model.out_dim) == ("conv", 128)
    assert (supcon.loss.name, supcon.data.views, supcon.model.encoder) == ("supcon_out", 2, "resnet18")
    assert supcon.optim.schedule == "cosine"
    assert {c.data.source for c in (autoencoder, guided, supcon)} == {data}
