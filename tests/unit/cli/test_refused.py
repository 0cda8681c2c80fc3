"""`config`, `run` and `grid` refuse every wrong setting before any data is read: exit code 2, one line, no folder."""

from __future__ import annotations

import subprocess

import pytest

from hpc_supcon import cli
from hpc_supcon.config import yaml12
from hpc_supcon.training import data as training_data
from tests.commands import run
from tests.processes import Ranks

DEEPSPEED = ["train.engine=deepspeed", "train.deepspeed.zero=2"]
VALIDATE = "validation.every_epochs=1"
SCAN = ["prune.method=layer_sensitive"]
CHANNELS = ["prune.method=channels"]
RAMP = ["prune.schedule=gradual", "prune.finetune.iterations=10"]
ROUNDS = ["prune.schedule=iterative", "prune.finetune.iterations=10"]
UNLABELED = ["data.source=image_folder", "data.labels=none", "loss.name=simclr"]
MULTI_CROP = ["loss.name=swav", "model.encoder=resnet9_small", "data.views={global: 2, local: 4}"]
FIVE = ["data.source=image_folder", "data.root=images", "data.channels=5"]
NO_VALIDATION = ["data.source=mnist", "data.validation_fraction=0", "probe.linear.lrs=[0.1]"]

# what is wrong: (overrides, part of the line that is shown)
WRONG = {
    "unknown loss": (["loss.name=nonsense"], "unknown loss.name 'nonsense'; known: barlow_twins,"),
    "unknown loss in a sum": (["loss.terms={tcl: 1.0, tcll: 1.0}"], "unknown loss.terms 'tcll'; did you mean 'tcl'?"),
    "unknown encoder": (["model.encoder=resnet19"], "unknown model.encoder 'resnet19'; did you mean 'resnet9'"),
    "unknown data": (["data.source=imagenet"], "unknown data.source 'imagenet'"),
    "unknown logger": (["log.to=[csv, wandbb]"], "unknown log.to 'wandbb'; did you mean 'wandb'?"),
    "a logger twice": (["log.to=[csv, csv]"], "log.to names one twice: csv, csv"),
    "unknown artifact": (["log.artifacts=[pages]"], "unknown log.artifacts 'pages'; did you mean 'page'?"),
    "a port that cannot be": (["log.metrics_port=70000"], "log.metrics_port: input should be less than or equal to"),
    "unknown sampler": (["data.sampler=balanced"], "unknown data.sampler 'balanced'; did you mean 'class_balanced'?"),
    "unknown loader": (["data.loader=ffvc"], "unknown data.loader 'ffvc'; did you mean 'ffcv'?"),
    "unknown policy": (["augment.policy=simaug"], "unknown augment.policy 'simaug'; did you mean 'simaugment'?"),
    "unknown autoaugment": (
        ["augment.autoaugment=cifar"],
        "unknown augment.autoaugment 'cifar'; did you mean 'cifar10'?",
    ),
    "unknown backend": (["loss.backend=cuda"], "unknown loss.backend 'cuda'; known: auto, reference, tiled, triton"),
    "unknown optimizer": (["optim.name=adam"], "unknown optim.name 'adam'; did you mean 'adamw'?"),
    "unknown engine": (["train.engine=dpp"], "unknown train.engine 'dpp'; did you mean 'ddp'?"),
    "unknown stem": (["model.stem=tiny"], "unknown model.stem 'tiny'; known: auto, small, standard"),
    "unknown probe": (["probe.kind=[knn, liner]"], "unknown probe.kind 'liner'; did you mean 'linear'?"),
    "unknown other data": (["probe.ood=minst"], "unknown probe.ood 'minst'; did you mean 'mnist'"),
    "other data that is the run's own": (
        ["probe.ood=[mnist, digits]"],
        "probe.ood=digits: that is the run's own data",
    ),
    "other data twice": (["probe.ood=[mnist, mnist]"], "probe.ood names a data set twice: mnist, mnist"),
    "a folder without its path": (
        ["probe.ood=[image_folder]"],
        "probe.ood=image_folder: name its folder as image_folder:PATH",
    ),
    "other data and no features": (
        ["probe.ood=[mnist]", "probe.kind=softmax"],
        "probe.ood compares features of an encoder, but probe.kind=softmax reads pixels",
    ),
    "no labels and a data set that has them": (
        ["data.labels=none"],
        "data.labels=none is for data.source=image_folder, manifest, huggingface, webdataset; digits has labels",
    ),
    "no labels and a loss of labels": (
        [*UNLABELED, "loss.name=tcl"],
        "data.labels=none: the images have no labels, which loss tcl tells apart: use loss.supervised=false",
    ),
    "no labels and a classifier": (
        [*UNLABELED, "loss.terms={simclr: 1, cross_entropy: 1}", "loss.supervised=false"],
        "which loss cross_entropy learns: use loss.name=simclr",
    ),
    "no labels and a sampler of classes": (
        [*UNLABELED, "data.sampler=long_tail_aware"],
        "which data.sampler=long_tail_aware draws by: use data.sampler=random",
    ),
    "no labels and responses": (
        [*UNLABELED, "loss.name=supcon_out", "loss.supervised=false", "log.gradient_response=true"],
        "by which log.gradient_response counts positives",
    ),
    "no labels and an online probe": (
        [*UNLABELED, VALIDATE, "validation.probe.kind=knn"],
        "on which validation.probe.kind=knn is fitted: use none",
    ),
    "no labels and a target accuracy": (
        [*UNLABELED, VALIDATE, "train.stopping={monitor: accuracy, target: 0.9}"],
        "the images have no labels and so no accuracy: use train.stopping.monitor=loss",
    ),
    "no labels and corruptions": (
        [*UNLABELED, "probe.corruptions=fog"],
        "data.labels=none: probe.corruptions needs probes of the run's own images",
    ),
    "no labels and outliers": (
        [*UNLABELED, "probe.ood=mnist"],
        "data.labels=none: probe.ood needs probes of the run's own images",
    ),
    "no labels and probes of pixels": (
        [*UNLABELED, "probe.kind=softmax"],
        "data.labels=none: probe.kind=softmax reads pixels of the run's own images",
    ),
    "too many channels": (["data.channels=65"], "data.channels: input should be less than or equal to 64"),
    "no channels": (["data.synthetic.channels=0"], "data.synthetic.channels: input should be greater than or equal"),
    "a depth that no image has": (["data.synthetic.bits=12"], "data.synthetic.bits: input should be 8 or 16"),
    "five channels of gray images": (
        ["data.channels=5"],
        "data.channels=5: the images of data.source=digits become 1 (gray) or 3 (RGB) channels",
    ),
    "five channels of a .beton": (
        [*FIVE, "data.beton=a.beton"],
        "data.channels=5: .beton files hold images of 1 or 3 channels; use data.beton=null",
    ),
    "five channels and a loader of pictures": (
        [*FIVE, "data.loader=dali"],
        "data.channels=5: data.loader=dali decodes 8-bit images of 1 or 3 channels; use resident or torch",
    ),
    "five channels and operations on gray levels": (
        [*FIVE, "augment.policy=randaugment"],
        "data.channels=5: augment.policy=randaugment changes 8-bit images of 1 or 3 channels; use flip_crop",
    ),
    "16 bits and operations on gray levels": (
        ["data.source=synthetic", "data.synthetic.bits=16", "augment.policy=autoaugment"],
        "data.synthetic.bits=16: augment.policy=autoaugment changes 8-bit images of 1 or 3 channels",
    ),
    "five channels and corruptions": (
        [*FIVE, "probe.corruptions=fog"],
        "data.channels=5: probe.corruptions are for 8-bit images of 1 or 3 channels; use []",
    ),
    "channels of synthetic images by two settings": (
        ["data.source=synthetic", "data.channels=5"],
        "data.channels=5 but data.synthetic.channels=3: set only the second",
    ),
    "a transfer to unknown data": (["probe.transfer=minst"], "unknown probe.transfer 'minst'; did you mean 'mnist'"),
    "a transfer to the run's own data": (
        ["probe.transfer=[mnist, digits]"],
        "probe.transfer=digits: that is the run's own data",
    ),
    "a transfer twice": (
        ["probe.transfer=[mnist, 'mnist:/b']"],
        "probe.transfer names a data set twice: mnist, mnist",
    ),
    "a transfer to a folder without its path": (
        ["probe.transfer=image_folder"],
        "probe.transfer=image_folder: name its folder as image_folder:PATH",
    ),
    "a transfer of pixels": (
        ["probe.transfer=mnist", "probe.kind=softmax"],
        "probe.transfer measures an encoder on other data, but probe.kind=softmax reads pixels",
    ),
    "unknown online probe": ([VALIDATE, "validation.probe.kind=kmn"], "unknown validation.probe.kind 'kmn'"),
    "unknown pruning": (["prune.method=l2"], "unknown prune.method 'l2'; did you mean 'l1'?"),
    "unknown scope": (
        ["prune.scope=layers"],
        "unknown prune.scope 'layers'; did you mean 'layer'? known: global, layer",
    ),
    "a pattern that keeps all": (["prune.scope=4:4"], "prune.scope=4:4: N of every M weights are kept, so N must be"),
    "unknown score of channels": (
        ["prune.channels.score=l2"],
        "unknown prune.channels.score 'l2'; did you mean 'l1'?",
    ),
    "unknown values": (["prune.values=int4"], "unknown prune.values 'int4'"),
    "a layer without channels": (
        ["model.channels={conv1: [0, 3]}"],
        "model.channels: input should be greater than or",
    ),
    "unknown schedule": (["prune.schedule=oneshott"], "unknown prune.schedule 'oneshott'; did you mean 'oneshot'?"),
    "a rate of 1": (["prune.rate=[0.5, 1]"], "prune.rate=1: the share of weights to prune is 0 or more and below 1"),
    "a rewind to nowhere": (["prune.rewind=epoch 0"], "prune.rewind=epoch 0: must be null, initial, or `epoch N`"),
    "unknown input of a probe": (
        ["probe.linear.input=pixel"],
        "unknown probe.linear.input 'pixel'; did you mean 'pixels'?",
    ),
    "simclr with one view": (
        ["loss.name=simclr", "data.views=1"],
        "loss.name=simclr pulls an image's views together",
    ),
    "unsupervised with one view": (
        ["loss.supervised=false", "data.views=1"],
        "loss.supervised=false pulls an image's views",
    ),
    "a queue without a contrastive term": (
        ["loss.name=triplet", "loss.queue_size=64"],
        "loss.queue_size=64: triplet",
    ),
    "vicreg of one image": (
        ["loss.name=vicreg", "data.batch_size=1"],
        "data.batch_size: input should be greater than or equal to 2",
    ),
    "byol without a target": (["loss.name=byol"], "loss.name=byol aims at a momentum target"),
    "moco without a queue": (
        ["loss.name=moco_v2", "model.momentum_encoder=0.9"],
        "loss.name=moco_v2 compares with a queue of keys",
    ),
    "dino without a teacher": (["loss.name=dino"], "loss.name=dino aims at a momentum target"),
    "views of two sizes for a loss of one": (
        ["loss.name=vicreg", "data.views={global: 2, local: 4}"],
        "data.views={global: 2, local: 4}: vicreg takes views of one size",
    ),
    "local views alone": (["loss.name=swav", "data.views={local: 4}"], "data.views: give the number of global views"),
    "local views that are larger than global ones": (
        [*MULTI_CROP, "data.image_size=16", "augment.local.image_size=17"],
        "augment.local.image_size=17: local views are larger than the global ones",
    ),
    "local crops that are larger than global ones": (
        [*MULTI_CROP, "augment.crop_scale=[0.1, 0.2]"],
        "augment.local.crop_scale=[0.05, 0.4]: local crops may be larger than the global ones",
    ),
    "views of two sizes from a loader that crops": (
        [*MULTI_CROP, "data.image_size=32", "data.crop_while_decoding=true"],
        "data.crop_while_decoding takes crops of one size",
    ),
    "views of two sizes for an encoder of one": (
        [*MULTI_CROP, "model.encoder=conv"],
        "model.encoder=conv takes images of one size",
    ),
    "a probability for each of three views": (
        ["augment.solarize=[0.0, 0.2, 0.1]"],
        "augment.solarize=[0.0, 0.2, 0.1] has 3 probabilities for data.views=2",
    ),
    "a constant rate without a predictor": (
        ["loss.name=vicreg", "optim.predictor_schedule=constant"],
        "optim.predictor_schedule=constant: vicreg trains no predictor",
    ),
    "two losses that shape one projection": (
        ["loss.terms={byol: 1.0, tcl: 1.0}"],
        "loss.terms: byol and tcl would shape one projection in two ways",
    ),
    "a momentum encoder without a queue": (["model.momentum_encoder=0.9"], "set loss.queue_size as well"),
    "responses of another loss": (
        ["log.gradient_response=true", "loss.name=simclr"],
        "log.gradient_response is defined",
    ),
    "a temperature that overflows": (["loss.temperature=1e-3"], "loss.temperature=0.001 is below 0.002"),
    "an encoder without a decoder": (
        ["loss.name=reconstruction", "model.encoder=resnet18"],
        "resnet18 has no decoder",
    ),
    "the other stem of an encoder that has one": (
        ["model.stem=small"],
        "model.stem=small: conv has only its own stem",
    ),
    "ZeRO-2 with micro-batches": (
        [*DEEPSPEED, "train.micro_batch_size=8"],
        "train.micro_batch_size with train.deepspeed.zero=2",
    ),
    "ZeRO with LARS": ([*DEEPSPEED, "optim.name=lars"], "optim.name=lars needs the norm of every weight"),
    "a key of DeepSpeed that we set": (
        [*DEEPSPEED, "train.deepspeed.config={optimizer: {}}"],
        "optimizer is set by optim.name",
    ),
    "CUDA graphs without compilation": (["train.cuda_graphs=true"], "set train.compile=true as well"),
    "fp16 on a CPU": (["train.precision=fp16", "runtime.device=cpu"], "train.precision=fp16 needs a CUDA device"),
    "recomputation with compilation": (
        ["train.compile=true", "train.activation_checkpointing=true"],
        "train.activation_checkpointing: train.compile decides",
    ),
    "crops while decoding without a size": (
        ["data.crop_while_decoding=true"],
        "data.crop_while_decoding needs data.image_size",
    ),
    "padded crops while decoding": (
        ["data.crop_while_decoding=true", "data.image_size=32", "augment.policy=pad_crop"],
        "data.crop_while_decoding takes resized crops, not padded ones (augment.policy, augment.crop)",
    ),
    "crops that are larger than the image": (
        ["augment.crop_scale=[0.5, 1.5]"],
        "augment.crop_scale: a crop cannot be larger than the image",
    ),
    "ffcv without its files": (["data.loader=ffcv"], "data.loader=ffcv reads .beton files"),
    "classes times images": (
        ["data.sampler=class_balanced", "data.classes_per_batch=5", "data.images_per_class=7"],
        "data.classes_per_batch=5 times data.images_per_class=7 is 35, not data.batch_size=512",
    ),
    "stopping without validation": (["train.stopping.patience=3"], "train.stopping needs validation"),
    "validation without a split": ([VALIDATE, *NO_VALIDATION], "validation.every_* needs a validation split"),
    "learning rates without a split": (
        NO_VALIDATION[:2],
        "probe.linear.lrs has 6 learning rates but there is no validation split",
    ),
    "no probe": (["probe.kind=[]"], "probe.kind is an empty list"),
    "a probe twice": (["probe.kind=[knn, knn]"], "probe.kind names a probe twice: knn, knn"),
    "unknown corruption": (
        ["probe.corruptions=[fog, gausian_noise]"],
        "unknown probe.corruptions 'gausian_noise'; did you mean 'gaussian_noise'?",
    ),
    "one unknown corruption": (["probe.corruptions=frog"], "unknown probe.corruptions 'frog'; did you mean 'fog'?"),
    "a corruption twice": (["probe.corruptions=[fog, fog]"], "probe.corruptions names a corruption twice: fog, fog"),
    "a probe's target beyond 1": (
        ["probe.linear.stopping.target=90"],
        "probe.linear.stopping.target=90: an accuracy is a fraction",
    ),
    "a title that leaves the folder": (["report.title=../a"], "report.title='../a' cannot be part of a file's name"),
    "a title that ends in a space": (["report.title='a '"], "report.title='a ' cannot be part of a file's name"),
    "maps of no kind": (["report.methods=[tsn]"], "unknown report.methods 'tsn'; did you mean 'tsne'?"),
    "a kind of map twice": (["report.methods=[pca, pca]"], "report.methods names one twice: pca, pca"),
    "no perplexity": (["report.perplexity=[]"], "report.perplexity is an empty list"),
    "maps of a split that there is not": (
        [*NO_VALIDATION, "report.split=validation"],
        "report.split=validation but there is no validation split",
    ),
    "Nesterov of AdamW": (["optim.name=adamw", "optim.nesterov=true"], "optim.nesterov is for sgd and lars"),
}


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    """Whoever asks for the data has gone too far."""

    def load_data(*_: object) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr(training_data, "load_data", load_data)


def settings_of(overrides):
    """As a grid file gives them."""
    pairs = (override.partition("=") for override in overrides)
    return {key: yaml12.loads(text, key) for key, _, text in pairs}


def grid(folder, overrides, **keys):
    """A grid file of one cell with these settings."""
    path = folder / "grid.yaml"
    path.write_text(yaml12.dumps({"name": "one", "base": "quickstart", "set": settings_of(overrides), **keys}))
    return str(path)


@pytest.mark.parametrize("command", ["config", "run", "grid expand", "grid submit"])
@pytest.mark.parametrize("case", WRONG)
def test_refused(capsys, tmp_path, monkeypatch, case, command):
    monkeypatch.chdir(tmp_path)
    overrides, said = WRONG[case]
    if command.startswith("grid"):
        code, out, err = run(capsys, *command.split(), grid(tmp_path, overrides))
    else:
        code, out, err = run(capsys, command, "quickstart", *overrides, "run_dir=here")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] in ([], ["grid.yaml"])


def test_a_right_configuration_goes_on_to_the_data(capsys, tmp_path):
    with pytest.raises(AssertionError, match="the data was read"):
        cli.main(["run", "quickstart", "runtime.device=cpu", f"run_dir={tmp_path}/r"])


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        ("pretrain", [], "data.batch_size=512 is the global batch and cannot be shared equally by 6 ranks: use 510"),
        ("probe", ["probe.kind=finetune"], "probe.finetune.batch_size=256 is the global batch and cannot be shared"),
        (
            "prune",
            ["prune.finetune.epochs=1"],
            "data.batch_size=512 is the global batch and cannot",
        ),
    ],
)
def test_a_batch_that_the_ranks_of_a_grids_job_cannot_share(capsys, tmp_path, stage, overrides, said):
    axes = {"prune.rate": [0.5]} if stage == "prune" else {}
    path = grid(tmp_path, overrides, axes=axes, resources={stage: {"nodes": 2, "gpus": 3}})
    code, out, err = run(capsys, "grid", "expand", path)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"hpc-supcon: error: grid 'one': cell quickstart: {said}" in err


@pytest.mark.parametrize("command", ["run", "pretrain"])
def test_a_batch_that_the_ranks_of_a_launch_cannot_share(tmp_path, command):
    it = Ranks([command, "quickstart", f"run_dir={tmp_path}/r"], tmp_path / "stderr", 3)
    assert it.end() == [2, 2, 2]
    said = "data.batch_size=512 is the global batch and cannot be shared equally by 3 ranks: use 510 or 513"
    assert it.stderr == f"hpc-supcon: error: {said}\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["probe.kind=softmax"], "probe.kind=softmax reads pixels, which pruning does not change"),
        (UNLABELED, "data.labels=none: prune compares probes of the run's own images, which have no labels"),
        (["prune.rate=[0.5, 0.50]"], "prune.rate names a rate twice: 0.5, 0.5"),
        (
            ["prune.scope=2:4", "prune.rate=[0.5, 0.6]"],
            "prune.scope=2:4 has a rate of its own, 1 - N/M, but prune.rate",
        ),
        (
            [*SCAN, "prune.scope=1:4"],
            "prune.scope=1:4 gives every layer one rate, which prune.method=layer_sensitive",
        ),
        ([*CHANNELS, "prune.scope=2:4"], "but prune.method=channels removes whole channels: use"),
        ([*CHANNELS, *RAMP], "but prune.method=channels changes their shapes: use prune.schedule=iterative"),
        (
            [*CHANNELS, *ROUNDS, "prune.rewind=initial"],
            "which the run's checkpoints do not have: use prune.schedule=one",
        ),
        (["prune.scope=2:4", "prune.schedule=iterative"], "prune.scope=2:4 has one rate, to which"),
        (
            ["prune.method=fishleg", "loss.name=triplet"],
            "prune.method=fishleg needs a likelihood, which the loss triplet is not: set prune.loss=cross_entropy",
        ),
        (
            ["prune.method=obs_diag", "loss.terms={supcon_out: 1.0, cross_entropy: 1.0}"],
            "prune.method=obs_diag needs a likelihood, which the loss",
        ),
        (["prune.method=obs_block", *RAMP], "scores weights during training, for which prune.method=obs_block needs"),
        ([*SCAN, "prune.scope=layer"], "prune.scope=layer gives every layer one rate"),
        ([*SCAN, *NO_VALIDATION], "prune.method=layer_sensitive scans the loss on the validation split"),
        ([*SCAN, "prune.scan.rates=[0.5, 0.50]", "prune.rate=0.3"], "prune.scan.rates names a rate twice"),
        (
            [*SCAN, "prune.scan.rates=[0.5]", "prune.rate=[0.3, 0.7]"],
            "prune.rate=0.7 is above the largest of prune.scan",
        ),
        (
            ["prune.schedule=iterative", "prune.rate=[0.5, 0.3]"],
            "but prune.rate gives the rounds 0.5, 0.3: give increas",
        ),
        (["prune.schedule=iterative", "prune.rate=0"], "prunes more in every round, but prune.rate gives the rounds"),
        (["prune.interval=5"], "prune.interval=5 is for prune.schedule=gradual alone; use null"),
        (["prune.schedule=gradual"], "prune.schedule=gradual prunes while it fine-tunes: set prune.finetune.epochs"),
        ([*RAMP, *SCAN], "scores weights during training, for which prune.method=layer_sensitive needs"),
        ([*RAMP, "prune.rewind=initial"], "prune.schedule=gradual prunes weights as they are trained; use iterative"),
        ([*RAMP, "prune.steps=4", "prune.interval=3"], "prune.steps=4 prunings, one every 3 steps, end after"),
        (["prune.rewind=epoch 3"], "prune.rewind=epoch 3 takes the weights back to be trained again: set"),
        (
            ["prune.rewind=initial", *ROUNDS, "prune.finetune.between=false"],
            "prune.rewind=initial: without prune.finetune.between, the next round",
        ),
        (
            ["prune.finetune.loss=cross_entropy", "prune.finetune.epochs=1", *NO_VALIDATION[:2], "probe.kind=knn"],
            "probe.linear.lrs has 6 learning rates but there is no validation split",
        ),
    ],
)
def test_a_cell_that_cannot_be_pruned(capsys, tmp_path, overrides, said):
    axes = {"pruning": {"some": {"prune.label": "some", **settings_of(overrides)}}}
    code, out, err = run(capsys, "grid", "expand", grid(tmp_path, [], axes=axes))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err


@pytest.mark.parametrize("command", ["config", "run", "grid expand"])
@pytest.mark.parametrize("case", ["unknown loss", "unknown encoder", "simclr with one view"])
def test_refused_without_importing_torch(python, tmp_path, case, command):
    overrides, said = WRONG[case]
    more = [grid(tmp_path, overrides)] if command == "grid expand" else ["quickstart", *overrides]
    code = (
        "import sys; from hpc_supcon.cli import main\n"
        f"try: main({[*command.split(), *more]!r})\n"
        "except SystemExit as stopped: code = stopped.code\n"
        "assert not {'torch', 'timm', 'hpc_supcon.data'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert said in done.stderr
