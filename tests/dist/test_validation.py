"""Validation during training: exact over ranks, and training goes on as if nobody had looked."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, EvalTransform, Splits, TrainOrder
from hpc_supcon.errors import ConfigError
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.models import build_model
from hpc_supcon.training import assemble
from hpc_supcon import checkpoint
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.training.validation import VIEWS_STREAM, build_validate, check_validation_split
from tests.dist.ranks import run_ranks

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
    pretrain(config, runtime, assemble.load_data(config, runtime), resume=resume)
    return config, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(lines, name):
    return [line for line in lines if line["event"] == name]


def validated(rank, world_size, overrides):
    """What validation says of a fresh model on an odd number of images."""
    config = load_config("default", [*SETTINGS, "validation.every_epochs=1", *overrides])
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(23) // 9  # sorted by class, as files are
    source = ArraySource(images, labels, ("a", "b", "c"))
    splits = Splits(source, source, source)
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    options = assemble.loader_options(config)
    data = assemble.Data(splits, "resident", "", options, options)
    description = assemble.describe_model(config, splits)
    assemble.seed_models(config)
    model = build_model(description)
    views = assemble.build_views(config, description, runtime, stream=VIEWS_STREAM)
    state = assemble.build_state(config, model, assemble.build_objective(config, views), views, runtime)
    transform = EvalTransform(**description["normalization"])
    validate = build_validate(config, data, views, transform, runtime, None)
    first = validate(state)
    assert validate(state) == first, "two looks at the same weights must agree"
    assert state.parallel.training
    return first, {k: v.clone() for k, v in model.state_dict().items()}, (images, labels, description)


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
def test_a_contrastive_loss_sees_mixed_global_batches(world_size):
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


def test_looking_changes_nothing_in_training(tmp_path):
    for name, look in {"plain": [], "looked": ["validation.every_steps=1"]}.items():
        train(tmp_path / name, SUM, "train.ema=0.9", *look)
    plain, looked = (checkpoint.load_newest(tmp_path / name / "checkpoints")[0] for name in ("plain", "looked"))
    assert plain.path.name == looked.path.name
    for stem, tensors in plain.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, looked.tensors[stem][key]), f"{stem}: {key}"


def test_iterations_replace_epochs_and_span_them(tmp_path):
    _, lines = train(tmp_path / "run", "train.iterations=8", "log.every_steps=1")  # 3 steps an epoch
    assert [line["step"] for line in events(lines, "train")] == list(range(1, 9))
    assert [line["epoch"] for line in events(lines, "train")] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [8]


STOP = ["validation.every_steps=1", "train.epochs=40", "train.stopping.patience=2"]


def test_stops_by_patience_and_keeps_the_best(tmp_path):
    # a learning rate that ruins the model: the first look is the best
    _, lines = train(tmp_path / "run", *STOP, "optim.lr=3.0", "optim.warmup_epochs=0")
    losses = [line["loss"] for line in events(lines, "validation")]
    steps = [line["step"] for line in events(lines, "validation")]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3, "two looks without improvement end it"
    stopped = events(lines, "stopped")[0]
    assert stopped["best_step"] == steps[best]
    newest, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert newest.state["stopping"]["best_at"] == steps[best]
    assert steps[best] in checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    # started again, it knows that it is done
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
        (["train.stopping.patience=3", "validation.every_epochs=1", "data.validation_fraction=0"], "validation split"),
        (["validation.every_epochs=1", "data.validation_fraction=0"], "validation split"),
        (["validation.every_epochs=1", "train.stopping.target=0.5", "train.stopping.monitor=accuracy"], "no classifier"),
        (["validation.probe.kind=knn"], "validation.every_epochs"),
        (["validation.every_epochs=1", "validation.probe={kind: knn, images: 30, k: 31, temperature: 1}"], "k=31"),
        (["validation.every_epochs=1", "validation.probe={kind: knn, images: 99, k: 37, temperature: 1}"], "has 36 im"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(overrides, message, tmp_path):
    config = load_config("default", [*SETTINGS, f"run_dir={tmp_path}/run", *overrides])
    runtime = Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        pretrain(config, runtime, assemble.load_data(config, runtime))
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
