"""Settings that contradict each other are refused, in one line that names them, before any data is read."""

from __future__ import annotations

from typing import get_args

import pytest

from hpc_supcon.config import check_config, check_ranks, load_config, recipe_names
from hpc_supcon.config.schema import names
from hpc_supcon.errors import ConfigError

DEEPSPEED = "train.engine=deepspeed"
VALIDATE = "validation.every_epochs=1"
NO_VALIDATION = "data.validation_fraction=0"
ONE_RATE = "probe.linear.lrs=[0.1]"
MULTI_CROP = "data.views={global: 2, local: 4}"
GRAPHS = ["train.cuda_graphs=true", "train.compile=true"]
KEYS = ["loss.keys=momentum", "loss.queue_size=8", "model.momentum_encoder=0.9"]


def check(*overrides, **options):
    check_config(load_config("default", [*overrides]), **options)


PRETRAIN = [
    # the model and its loss
    (["model.encoder=resnet19"], r"unknown model\.encoder 'resnet19'; did you mean 'resnet9' or 'resnet18'"),
    (["model.encoder=conv", "model.stem=small"], r"model\.stem=small: conv has only its own stem; use auto"),
    (["loss.name=reconstruction"], r"model\.encoder=resnet18 has no decoder, which reconstruction needs; use conv"),
    (["loss.terms={tcl: 1.0, reconstruction: 1.0}"], r"model\.encoder=resnet18 has no decoder"),
    (["loss.name=simclr", "data.views=1"], r"loss\.name=simclr .* data\.views of 2 or more"),
    (
        ["loss.name=cross_entropy", "loss.supervised=false"],
        r"loss\.supervised=false: cross_entropy compares no images",
    ),
    (["loss.name=triplet", "loss.supervised=false", "data.views=1"], r"supervised=false .* data\.views of 2 or more"),
    (["loss.name=supcon_in", "log.gradient_response=true"], r"one of supcon_out and tcl, not for supcon_in"),
    (["loss.terms={supcon_out: 1.0, tcl: 1.0}", "log.gradient_response=true"], r"not for supcon_out \+ tcl"),
    (
        ["loss.name=reconstruction", "model.encoder=conv", "train.micro_batch_size=8"],
        r"train\.micro_batch_size: reconstruction needs no large batch",
    ),
    (["loss.temperature=1e-3"], r"loss\.temperature=0\.001 is below 0\.002"),
    (["loss.backend=triton", "loss.temperature=0.02"], r"loss\.temperature=0\.02 .* use loss\.backend=tiled"),
    (["loss.backend=triton", "model.projection_dim=4096"], r"projection_dim=4096 .* use loss\.backend=tiled"),
    (["loss.backend=triton", "loss.precision=fp32"], r"use loss\.precision=tf32, or loss\.backend=tiled"),
    (
        ["loss.backend=tiled", "loss.precision=bf16"],
        r"loss\.precision=bf16 is a format of loss\.backend=triton; use auto",
    ),
    (["loss.name=triplet", "loss.queue_size=10"], r"loss\.queue_size=10: triplet takes no queue; use 0"),
    (["model.momentum_encoder=0.9"], r"model\.momentum_encoder .* set loss\.queue_size as well"),
    (["loss.keys=momentum"], r"loss\.keys=momentum: set model\.momentum_encoder .* and loss\.queue_size as well"),
    (["loss.keys=momentum", "loss.queue_size=8"], r"loss\.keys=momentum: set model\.momentum_encoder"),
    (
        ["loss.keys=momentum", "loss.name=triplet"],
        r"loss\.keys=momentum is for simclr, supcon_in, supcon_out, tcl, not for",
    ),
    ([*KEYS, "model.sync_bn=false"], r"model\.sync_bn=false: BatchNorm per rank tells which key belongs to an image"),
    ([*KEYS, "loss.backend=triton"], r"loss\.backend=triton compares a batch with itself; use auto"),
    ([*KEYS, "log.gradient_response=true"], r"log\.gradient_response compares a batch with itself; use false"),
    *[
        (["loss.name=" + name, "data.views=1"], rf"loss\.name={name} .* data\.views of 2 or more")
        for name in ("barlow_twins", "vicreg", "simsiam", "byol", "moco_v2", "swav", "dino")
    ],
    (["loss.name=byol"], r"loss\.name=byol aims at a momentum target: set model\.momentum_encoder"),
    (
        ["loss.name=moco_v2", "model.momentum_encoder=0.9"],
        r"moco_v2 compares with a queue of keys: set loss\.queue_size",
    ),
    (
        ["loss.name=moco_v2", "model.momentum_encoder=0.9", "loss.queue_size=8", "model.sync_bn=false"],
        r"model\.sync_bn=false: .* which key belongs to an image",
    ),
    (
        ["loss.name=simsiam", "model.momentum_final=1"],
        r"model\.momentum_final is for byol and dino and moco_v2, not for simsiam",
    ),
    (["loss.name=simsiam", "model.momentum_encoder=0.9"], r"model\.momentum_encoder makes the keys of a queue"),
    (["loss.terms={simsiam: 1.0, tcl: 1.0}"], r"loss\.terms: simsiam and tcl would shape one projection in two ways"),
    (
        ["loss.name=byol", "model.momentum_encoder=0.99", "loss.queue_size=8"],
        r"loss\.queue_size=8: byol takes no queue",
    ),
    (["loss.name=dino"], r"loss\.name=dino aims at a momentum target: set model\.momentum_encoder"),
    (
        ["loss.name=dino", "model.momentum_encoder=0.9", "loss.queue_size=8"],
        r"loss\.queue_size=8: dino takes no queue",
    ),
    (
        ["loss.name=swav", "loss.queue_size=8", "model.momentum_encoder=0.9"],
        r"momentum_encoder makes the keys of a queue",
    ),
    (
        ["optim.predictor_schedule=constant"],
        r"predictor_schedule=constant: supcon_out trains no predictor, as byol and",
    ),
    # views of two sizes
    *[
        ([f"loss.name={name}", MULTI_CROP], rf"data\.views={{global: 2, local: 4}}: {name} takes views of one size")
        for name in ("supcon_out", "triplet", "cross_entropy", "vicreg")
    ],
    (
        ["loss.name=simclr", "data.views={global: 1, local: 1}"],
        r"data\.views={global: 1, local: 1}: simclr takes views of one",
    ),
    (["loss.terms={swav: 1.0, cross_entropy: 0.1}", MULTI_CROP], r"cross_entropy takes views of one size"),
    (["loss.name=swav", "data.views={global: 1, local: 4}"], r"loss\.name=swav .* data\.views of 2 or more"),
    (
        ["loss.name=swav", MULTI_CROP, "data.image_size=32", "data.crop_while_decoding=true"],
        r"local: 4}: data\.crop_while_decoding takes crops of one size",
    ),
    (["loss.name=swav", MULTI_CROP, "augment.policy=none"], r"augment\.policy=none takes no crops"),
    (["loss.name=swav", MULTI_CROP, "model.encoder=conv"], r"model\.encoder=conv takes images of one size"),
    (
        ["loss.name=swav", MULTI_CROP, "data.image_size=12"],
        r"augment\.local\.image_size=16: local views are larger than the global ones, .* data\.image_size=12",
    ),
    (
        ["loss.name=swav", MULTI_CROP, "augment.crop_scale=[0.1, 0.3]"],
        r"augment\.local\.crop_scale=\[0\.05, 0\.4\]: local crops may be larger than .*=\[0\.1, 0\.3\]",
    ),
    (["augment.blur=[1.0, 0.1, 0.3]"], r"augment\.blur=\[1\.0, 0\.1, 0\.3\] has 3 probabilities for data\.views=2"),
    # the data
    (["data.sampler=class_balanced"], r"data\.sampler=class_balanced needs data\.classes_per_batch and"),
    (
        ["data.sampler=class_balanced", "data.classes_per_batch=4", "data.images_per_class=4"],
        r"data\.classes_per_batch=4 times data\.images_per_class=4 is 16, not data\.batch_size=256",
    ),
    (["data.crop_while_decoding=true"], r"data\.crop_while_decoding needs data\.image_size"),
    (["data.crop_while_decoding=true", "data.image_size=8", "augment.policy=none"], r"augment\.policy=none forbids"),
    (["data.loader=ffcv"], r"data\.loader=ffcv reads \.beton files"),
    (["data.loader=dali"], r"data\.loader=dali reads image files: use data\.source=image_folder"),
    (["data.loader=dali", "data.source=image_folder", "data.beton=x.beton"], r"data\.loader=dali .* no data\.beton"),
    (["data.beton=x.bin"], r"data\.beton=x\.bin: must end in \.beton"),
    (
        ["data.source=synthetic", "data.synthetic={images: 3, classes: 4, channels: 1, image_size: 8}"],
        r"data\.synthetic\.images=3: data\.synthetic\.classes=4 need",
    ),
    # validation and early stopping
    ([VALIDATE, NO_VALIDATION, ONE_RATE], r"validation\.every_\* needs a validation split: set data\.validation_fr"),
    (["validation.probe.kind=knn"], r"validation\.probe\.kind=knn .* set validation\.every_epochs"),
    (
        [VALIDATE, "validation.probe={kind: knn, images: 30, k: 31, temperature: 1.0}"],
        r"validation\.probe\.k=31 neighbors, but validation\.probe\.images=30",
    ),
    (["train.stopping.patience=3"], r"train\.stopping needs validation: set validation\.every_epochs"),
    ([VALIDATE, "train.stopping.patience=3", "train.stopping.monitor=accuracy"], r"supcon_out has no classifier"),
    (
        [VALIDATE, "train.stopping.target=95", "train.stopping.monitor=accuracy", "loss.name=cross_entropy"],
        r"train\.stopping\.target=95: an accuracy is a fraction",
    ),
    # the engine
    (["train.precision=fp16", "runtime.device=cpu"], r"train\.precision=fp16 needs a CUDA device; use bf16 or fp32"),
    ([*GRAPHS, "runtime.device=cpu"], r"train\.cuda_graphs=true needs a CUDA device"),
    (["train.cuda_graphs=true"], r"set train\.compile=true as well"),
    ([*GRAPHS, DEEPSPEED], r"train\.cuda_graphs=true: .* use train\.engine=ddp"),
    (["train.compile=true", "train.activation_checkpointing=true"], "use one of them"),
    (
        [DEEPSPEED, "train.deepspeed.zero=2", "train.micro_batch_size=8"],
        r"train\.micro_batch_size .* use zero 0 or 1",
    ),
    ([DEEPSPEED, "train.deepspeed.zero=1", "optim.name=lars"], r"optim\.name=lars .* use zero 0"),
    ([DEEPSPEED, "train.deepspeed.zero=2", "optim.name=lamb"], r"optim\.name=lamb .* use zero 0"),
    (["train.deepspeed.config={steps_per_print: 5}"], r"train\.deepspeed\.config is for train\.engine=deepspeed"),
    ([DEEPSPEED, "train.deepspeed.config={train_batch_size: 5}"], r"train_batch_size is set by data\.batch_size"),
    ([DEEPSPEED, "train.deepspeed.config={fp16: {enabled: true}}"], r"fp16 is set by train\.precision=fp16"),
    (
        [DEEPSPEED, "train.deepspeed.config.zero_optimization={stage: 2}"],
        r"zero_optimization\.stage is set by train\.deepspeed\.zero",
    ),
    (
        [DEEPSPEED, "train.deepspeed.config={zero_optimization: {offload_optimizer: {device: cpu}}}"],
        r"zero_optimization\.offload_optimizer is not supported",
    ),
]
PROBE = [
    (["probe.kind=[]"], r"probe\.kind is an empty list: name one or more of linear, "),
    (["probe.kind=[knn, linear, knn]"], r"probe\.kind names a probe twice: knn, linear, knn"),
    (
        ["probe.kind=mlp", "probe.mlp.stopping.target=95"],
        r"probe\.mlp\.stopping\.target=95: an accuracy is a fraction",
    ),
    (["probe.kind=mlp", "probe.mlp.batch_size=1"], r"probe\.mlp\.batch_norm needs at least two images"),
    (
        ["probe.kind=softmax", "probe.softmax.evaluate_every=21", "probe.softmax.iterations=20"],
        r"probe\.softmax\.evaluate_every=21 .* only 20 iterations",
    ),
    (["probe.kind=logistic", "probe.logistic.classes=[2, 2]"], r"probe\.logistic\.classes: twice the same class, 2"),
    ([NO_VALIDATION], r"probe\.linear\.lrs has 6 learning rates but there is no validation split"),
    (
        ["probe.kind=softmax", NO_VALIDATION],
        r"probe\.softmax\.stopping\.patience=50 but there is no validation split",
    ),
    (
        ["probe.kind=mlp", "probe.mlp.stopping.target=0.5", NO_VALIDATION],
        r"probe\.mlp\.stopping\.target=0\.5 but there is no validation split",
    ),
]
PRUNE = [
    (
        ["probe.kind=[softmax, logistic]"],
        r"probe\.kind=softmax, logistic reads pixels, which pruning does not change",
    ),
    (["prune.rate=[0.2, 0.20]"], r"prune\.rate names a rate twice: 0\.2, 0\.2"),
]


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        *(("pretrain", *case) for case in PRETRAIN),
        *(("probe", *case) for case in PROBE),
        *(("prune", *case) for case in [*PROBE, *PRUNE]),
    ],
)
def test_refused(stage, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(*overrides, stages=(stage,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.name=simclr", "loss.queue_size=64", "model.momentum_encoder=0.99"],
        ["loss.name=moco_v2", "loss.queue_size=64", "model.momentum_encoder=0.99", "model.momentum_final=0.999"],
        ["loss.terms={byol: 1.0, cross_entropy: 0.5}", "model.momentum_encoder=0.99", "train.micro_batch_size=8"],
        ["loss.terms={supcon_out: 1.0, cross_entropy: 0.5}", "log.gradient_response=true", "loss.queue_size=8"],
        ["loss.name=triplet", "data.views=1"],
        ["loss.name=triplet", "loss.temperature=1e-3", "loss.backend=triton"],
        ["loss.name=reconstruction", "model.encoder=conv", "augment.policy=none"],
        ["loss.temperature=0.002"],
        ["loss.backend=triton", "loss.temperature=0.025", "model.projection_dim=2048"],
        ["data.sampler=class_balanced", "data.classes_per_batch=8", "data.images_per_class=32"],
        ["data.crop_while_decoding=true", "data.image_size=8"],
        ["data.loader=dali", "data.source=image_folder"],
        ["data.loader=ffcv", "data.beton=x.beton"],
        # an image folder may have a validation split of its own
        [NO_VALIDATION, "data.source=image_folder", VALIDATE],
        [VALIDATE, "train.stopping.target=0.9", "train.stopping.monitor=accuracy", "loss.name=cross_entropy"],
        [VALIDATE, "train.stopping.target=95", "validation.probe.kind=linear"],
        ["train.compile=true"],
        ["train.precision=fp16", DEEPSPEED, "train.deepspeed.zero=2"],
        [*GRAPHS, "train.micro_batch_size=50"],
        [DEEPSPEED, "train.micro_batch_size=8", "train.deepspeed.zero=1"],
        [DEEPSPEED, "optim.name=lars", "train.deepspeed.zero=0"],
        [DEEPSPEED, "train.deepspeed.config={zero_optimization: {overlap_comm: true}}"],
        ["probe.kind=[knn, linear, finetune]", "prune.rate=[0.2, 0.3]"],
        ["probe.kind=softmax", "probe.softmax.input=features"],
    ],
)
def test_taken(overrides):
    check(*overrides, stages=("pretrain", "probe", "prune"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_taken(name):
    check_config(load_config(name), stages=("pretrain", "probe"))


def test_a_stage_is_not_refused_for_what_only_others_use():
    check(NO_VALIDATION, stages=("pretrain",))
    # a run that was trained on a GPU, on another number of ranks, is probed here
    check("train.precision=fp16", "runtime.device=cpu", "data.batch_size=250", stages=("probe",), world_size=3)
    check("probe.kind=softmax", stages=("pretrain", "probe"))


def test_a_run_whose_probes_all_read_pixels_trains_no_encoder():
    wrong = ["loss.name=simclr", "data.views=1"]
    check("probe.kind=softmax", *wrong)
    with pytest.raises(ConfigError, match="simclr"):
        check("probe.kind=softmax", "probe.softmax.input=features", *wrong)
    with pytest.raises(ConfigError, match="simclr"):
        check("probe.kind=softmax", *wrong, stages=("pretrain",))
    with pytest.raises(ConfigError, match=r"unknown model\.encoder"):
        check("probe.kind=softmax", "model.encoder=nonsense")


@pytest.mark.parametrize(
    ("stage", "world_size", "overrides", "message"),
    [
        ("pretrain", 3, [], r"data\.batch_size=256 is the global batch .* by 3 ranks: use 255 or 258"),
        ("pretrain", 7, ["data.batch_size=4"], "use 7$"),
        ("prune", 3, ["prune.finetune.epochs=1"], r"data\.batch_size=256 .* by 3 ranks"),
        (
            "probe",
            3,
            ["probe.linear.input=images", "probe.linear.standardize=false"],
            r"probe\.linear\.batch_size=1024 .* by 3 ranks: use 1023 or 1026",
        ),
        ("probe", 3, ["probe.kind=finetune"], r"probe\.finetune\.batch_size=256 .* by 3 ranks: use 255 or 258"),
        ("prune", 3, ["probe.kind=[knn, finetune]"], r"probe\.finetune\.batch_size=256 .* by 3 ranks"),
        (
            "pretrain",
            1,
            [*GRAPHS, "train.micro_batch_size=50"],
            r"256 images per rank in pieces of train\.micro_batch_size=50 .* divisor of 256",
        ),
        ("pretrain", 2, GRAPHS, r"train\.cuda_graphs=true: the pass of 2 ranks .* use .*=false, or one rank"),
        ("prune", 2, [*GRAPHS, "prune.finetune.epochs=1"], r"train\.cuda_graphs=true: the pass of 2 ranks"),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_refused(stage, world_size, overrides, message):
    config = load_config("default", overrides)
    for call in (check_config, check_ranks):
        with pytest.raises(ConfigError, match=message):
            call(config, world_size=world_size, stages=(stage,))
    check_config(config, stages=(stage,))


@pytest.mark.parametrize(
    ("stage", "world_size", "overrides"),
    [
        ("pretrain", 4, []),
        ("pretrain", 1, [*GRAPHS, "train.micro_batch_size=32"]),
        ("probe", 3, ["probe.kind=linear"]),
        ("prune", 3, ["probe.kind=knn"]),
    ],
)
def test_other_batches_are_taken(stage, world_size, overrides):
    check(*overrides, world_size=world_size, stages=(stage,))


@pytest.mark.parametrize("loss", ["simclr", "reconstruction", *get_args(names.OfViewsName)])
def test_losses_without_labels_train_on_images_that_have_none(loss):
    more = ["model.momentum_encoder=0.99"] if loss in get_args(names.TargetName) else []
    more += ["loss.queue_size=64"] if loss == "moco_v2" else []
    more += ["model.encoder=conv", "data.views=2", "model.projection_norm=all", "report.embeddings=false"]
    data = ["data.source=image_folder", "data.root=x", "data.labels=none", "probe.kind=knn", "probe.embedding=false"]
    load_config("default", [f"loss.name={loss}", *data, *more], stages=("pretrain",))
