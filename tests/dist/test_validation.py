"""Validation during training: exact over ranks, and without influence on training."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, EvalTransform, Splits, TrainOrder
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.evaluation.monitor import online_probe
from hpc_supcon.models import build_model
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.training.build import build_training
from hpc_supcon.training.data import load_data
from hpc_supcon.training.validation import build_validate, check_validation_split
from tests.dist.ranks import run_ranks
from tests.dist.test_step import in_memory

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 60, classes: 3, channels: 3, image_size: 8}",
    "data.validation_fraction=0.4", "data.batch_size=12", "model.encoder=conv", "model.projection_hidden=16",
    "model.projection_dim=8", "train.precision=fp32", "train.epochs=3", "log.tensorboard=false", "log.every_steps=1",
    "optim.lr=0.05", "checkpoint.every_epochs=null", "runtime.threads=1", "loss.temperature=0.3",
]  # fmt: skip
SUM = "loss.terms={supcon_out: 0.5, cross_entropy: 2.0, reconstruction: 0.25}"


def train(folder, *more, rank=0, world_size=1, resume=False):
    config = load_config("default", [*SETTINGS, f"run_dir={folder}", *more])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    data = load_data(config, runtime)
    pretrain(config, runtime, data, resume=resume, online_probe=online_probe(config, runtime, data))
    return config, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(lines, name):
    return [line for line in lines if line["event"] == name]


def validated(rank, world_size, overrides):
    """The numbers of validation for a new model on an odd number of images."""
    config = load_config("default", [*SETTINGS, "validation.every_epochs=1", *overrides])
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(23) // 9  # sorted by class, as files are
    source = ArraySource(images, labels, ("a", "b", "c"))
    splits = Splits(source, source, source)
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    data = in_memory(splits)
    training = build_training(config, data, runtime)
    validate = build_validate(config, data, training, runtime, None)
    first = validate()
    assert validate() == first, "two validations of the same weights must agree"
    assert training.state.parallel.training
    weights = {k: v.clone() for k, v in training.state.model.state_dict().items()}
    return first, weights, (images, labels, training.description)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_of_single_images_equal_a_plain_loop_on_any_number_of_ranks(world_size):
    overrides = ["loss.terms={cross_entropy: 2.0, reconstruction: 0.25}", "model.sync_bn=true", "augment.policy=none"]
    got = run_ranks(validated, world_size, overrides)
    numbers, weights, (images, labels, description) = got[0]
    assert all(other[0] == numbers for other in got)
    model = build_model(description)
    model.load_state_dict(weights)
    model.eval()
    x = EvalTransform(**description["normalization"])(images)
    with torch.no_grad():
        features = model.encoder(x)
        logits, decoded = model.heads["classifier"](features), model.heads["decoder"](features)
    error = decoded - (images / 255 * 2 - 1)
    mae, mse = error.abs().mean().item(), error.square().mean().item()
    cross_entropy = F.cross_entropy(logits, labels).item()
    want = {
        "loss": 2 * cross_entropy + 0.25 * (0.5 * mse + 0.5 * mae),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "mae": mae,
        "mse": mse,
    }
    assert numbers == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_contrastive_loss_is_validated_on_shuffled_global_batches(world_size):
    # without random views every rank count must give the same loss: that of shuffled batches of 12 (23 // 12 = 1)
    overrides = ["augment.policy=none"]
    numbers, weights, (images, labels, description) = run_ranks(validated, world_size, overrides)[0]
    rows = TrainOrder(23, 12).epoch(0, 0, 0, 1)[0]
    model = build_model(description)
    model.load_state_dict(weights)
    model.eval()
    x = EvalTransform(**description["normalization"])(images[rows])
    with torch.no_grad():
        z = model.heads["projection"](model.encoder(x)).repeat_interleave(2, dim=0)
    want = supcon_brute_force(z.double(), labels[rows].repeat_interleave(2), 0.3)
    assert numbers["loss"] == pytest.approx(want, rel=1e-5)


def supcon_brute_force(z, y, tau):
    """Khosla et al. 2020, equation 2, term by term."""
    values = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        denominator = torch.logsumexp(torch.stack([z[i] @ z[a] / tau for a in others]), 0)
        values.append(-sum(z[i] @ z[p] / tau - denominator for p in positives) / len(positives))
    return float(sum(values) / len(values))


def test_validation_changes_nothing_in_training(tmp_path):
    for name, more in {"plain": [], "validated": ["validation.every_steps=1"]}.items():
        train(tmp_path / name, SUM, "train.ema=0.9", *more)
    plain, validated = (checkpoint.load_newest(tmp_path / name / "checkpoints")[0] for name in ("plain", "validated"))
    assert plain.path.name == validated.path.name
    for stem, tensors in plain.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, validated.tensors[stem][key]), f"{stem}: {key}"


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_probe_is_fitted_in_every_validation_and_changes_nothing_in_training(tmp_path, kind):
    probe = [f"validation.probe={{kind: {kind}, images: 36, k: 5, temperature: 0.1}}", "validation.every_steps=2"]
    train(tmp_path / "plain", "train.ema=0.9")
    _, lines = train(tmp_path / "probed", "train.ema=0.9", *probe)
    accuracies = [line[f"{kind}_accuracy"] for line in events(lines, "validation")]
    assert len(accuracies) == 4
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    plain, probed = (checkpoint.load_newest(tmp_path / name / "checkpoints")[0] for name in ("plain", "probed"))
    for stem, tensors in plain.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, probed.tensors[stem][key]), f"{stem}: {key}"


def test_iterations_replace_epochs_and_span_them(tmp_path):
    _, lines = train(tmp_path / "run", "train.iterations=8", "log.every_steps=1")  # 3 steps an epoch
    assert [line["step"] for line in events(lines, "train")] == list(range(1, 9))
    assert [line["epoch"] for line in events(lines, "train")] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [8]


STOP = ["validation.every_steps=1", "train.epochs=40", "train.stopping.patience=2"]


def test_stops_by_patience_and_keeps_the_best(tmp_path):
    # a learning rate that ruins the model: the first validation is the best
    _, lines = train(tmp_path / "run", *STOP, "optim.lr=3.0", "optim.warmup_epochs=0")
    losses = [line["loss"] for line in events(lines, "validation")]
    steps = [line["step"] for line in events(lines, "validation")]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3, "two validations without improvement end it"
    stopped = events(lines, "stopped")[0]
    assert stopped["best_step"] == steps[best]
    newest, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert newest.state["stopping"]["best_at"] == steps[best]
    assert steps[best] in checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    # a resumed run knows that it has finished
    before = (tmp_path / "run" / "metrics.jsonl").read_text().count('"event": "train"')
    train(tmp_path / "run", *STOP, "optim.lr=3.0", "optim.warmup_epochs=0", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"event": "train"') == before


def test_stops_at_a_target(tmp_path):
    target = ["train.stopping={monitor: accuracy, patience: null, min_change: 0.0, target: 0.2}"]
    _, lines = train(tmp_path / "run", "loss.name=cross_entropy", "validation.every_steps=1", *target)
    first = next(line["step"] for line in events(lines, "validation") if line["accuracy"] >= 0.2)
    assert events(lines, "stopped")[0]["step"] == first == events(lines, "train")[-1]["step"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stopping.patience=3"], "validation.every_epochs"),
        (
            ["train.stopping.patience=3", "validation.every_epochs=1", "data.validation_fraction=0"],
            "validation split",
        ),
        (["validation.every_epochs=1", "data.validation_fraction=0"], "validation split"),
        (
            ["validation.every_epochs=1", "train.stopping.target=0.5", "train.stopping.monitor=accuracy"],
            "no classifier",
        ),
        (["validation.probe.kind=knn"], "validation.every_epochs"),
        (["validation.every_epochs=1", "validation.probe={kind: knn, images: 30, k: 31, temperature: 1}"], "k=31"),
        (
            ["validation.every_epochs=1", "validation.probe={kind: knn, images: 99, k: 37, temperature: 1}"],
            "has 36 im",
        ),
    ],
)
def test_impossible_settings_are_refused_before_training(overrides, message, tmp_path):
    config = load_config("default", [*SETTINGS, f"run_dir={tmp_path}/run", *overrides])
    runtime = Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        pretrain(config, runtime, load_data(config, runtime))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stopping.patience=3"], r"train\.stopping needs a validation split"),
        ([], r"validation\.every_\* needs a validation split"),
    ],
)
def test_an_image_folder_without_a_validation_split_is_refused(overrides, message):
    folder = ["data.source=image_folder", "data.validation_fraction=0", "validation.every_epochs=1"]
    config = load_config("default", [*folder, *overrides], stages=("pretrain",))
    source = ArraySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    with pytest.raises(ConfigError, match=message):
        check_validation_split(config, Splits(source, None, source))
    check_validation_split(config, Splits(source, source, source))
