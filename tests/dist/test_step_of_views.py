"""Steps of the losses of views: ranks equal one process, two passes equal one, and the momentum target."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hpc_supcon.models import Predictor, PretrainingModel, Projection
from hpc_supcon.training.build import Start
from hpc_supcon.training.ema import momentum_at
from hpc_supcon.training.step import train_step
from tests.dist.ranks import run_ranks
from tests.dist.test_step import DoubleEncoder, build

MULTI_CROP = ["model.input_size=8", "data.views={global: 2, local: 3}", "augment.local.image_size=6"]
DINO = [
    "model.momentum_encoder=0.9", "model.momentum_final=1.0", "loss.prototypes=5", "loss.teacher_warmup_epochs=2",
    "loss.frozen_epochs=0.4", "model.projection_activation=gelu", "model.projection_layers=3", "train.epochs=4",
]  # fmt: skip
FORMS = {
    "barlow_twins": ["model.projection_layers=3", "model.projection_norm=hidden", "optim.lr=0.01"],
    "vicreg": ["model.projection_layers=3", "model.projection_norm=hidden", "optim.lr=0.01"],
    "simsiam": ["model.projection_norm=all", "model.predictor_hidden=6"],
    "simsiam, constant": [
        "model.projection_norm=all",
        "model.predictor_hidden=6",
        "optim.predictor_schedule=constant",
    ],
    "byol": ["model.momentum_encoder=0.9", "model.momentum_final=1.0", "model.predictor_hidden=6"],
    "moco_v2": ["model.momentum_encoder=0.9", "loss.queue_size=40"],
    "swav": ["loss.prototypes=5", "loss.frozen_epochs=0.4"],
    "swav, queue": ["loss.prototypes=5", "loss.queue_size=40", "loss.queue_start_epoch=0"],
    "swav, multi-crop": ["loss.prototypes=5", "loss.queue_size=40", "loss.queue_start_epoch=0", *MULTI_CROP],
    "dino": DINO,
    "dino, multi-crop": [*DINO, *MULTI_CROP],
}
"""By loss, and what more there is to it."""


def overrides_of(form, *more):
    name = form.partition(",")[0]
    return [f"loss.name={name}", "model.projection_hidden=16", "model.projection_dim=8", *FORMS[form], *more]


def two_views(images, drawn):
    """Not random, so that an image has the same views on every rank."""
    x = images.double() / 128 - 1
    return torch.stack([x, x.flip(-1) * 0.7 + 0.1], dim=1)


def multi_crop(images, drawn):
    """As `two_views`, and three local views."""
    both = two_views(images, drawn)
    return both, torch.stack([both[:, 0, :, :6, 2:], both[:, 1, :, 2:, :6], both[:, 0, :, 1:7, 1:7] * 0.5], dim=1)


def five_steps(rank, world_size, name, *more, frozen=False):
    """(losses, weights, state of the objective) after five steps; frozen: BatchNorm with its running statistics."""
    state, options, batches = build(rank, world_size, overrides_of(name, *more), start=double_start)
    state.views.render = multi_crop if "multi-crop" in name else two_views
    state.objective.double()  # prototypes
    if frozen:
        for part in (*state.model.modules(), *state.objective.modules()):
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
    losses = [float(train_step(state, batch, options).loss) for batch in batches]
    copies = ({k: v.clone() for k, v in part.state_dict().items()} for part in (state.model, state.objective))
    return losses, *copies


class AnySize(DoubleEncoder):
    """Of images of any size, their pixels by rows and columns being averaged to 4 x 4."""

    def forward(self, x):
        pooled = nn.functional.interpolate(nn.functional.adaptive_avg_pool2d(x.double(), 4), size=(8, 8))
        return super().forward(pooled)


def double_start(config):
    torch.manual_seed(config.seed)
    model, encoder = config.model, AnySize() if config.data.crops[1] else DoubleEncoder()
    unit = config.loss.name in ("moco_v2", "swav", "dino")
    layers = model.projection_layers, model.projection_norm, model.projection_activation
    heads = {"projection": Projection(12, 16, 8, *layers, unit=unit).double()}
    if config.loss.name in ("simsiam", "byol"):
        heads["prediction"] = Predictor(8, model.predictor_hidden).double()
    return Start(PretrainingModel(encoder, heads))


def assert_equal_runs(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-9)
    for part in (1, 2):
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            assert (got[part][name] - value).double().norm() <= 1e-9 * value.double().norm() + 1e-12, name


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("piece", [5, 24])
def test_five_steps_in_two_passes_equal_five_in_one(name, piece):
    want = five_steps(0, 1, name, frozen=True)
    assert want[0][0] != want[0][4]
    got = five_steps(0, 1, name, f"train.micro_batch_size={piece}", frozen=True)
    assert_equal_runs(got, want)


def every_loss(rank, world_size):
    return {name: five_steps(rank, world_size, name) for name in FORMS}


@pytest.mark.parametrize("world_size", [2, 3])
def test_five_steps_of_ranks_equal_five_of_one_process(world_size):
    ranks = run_ranks(every_loss, world_size)
    for name in FORMS:
        want = five_steps(0, 1, name)
        for result in ranks:
            assert_equal_runs(result[name], want)


def test_byols_momentum_rises_by_half_a_cosine():
    rises = [momentum_at(k, base=0.99, final=1.0, steps=100) for k in (0, 25, 50, 100)]
    # 1 - (1 - base) (cos(pi k / K) + 1) / 2
    assert rises == pytest.approx([1 - 0.01 * (math.cos(math.pi * k / 100) + 1) / 2 for k in (0, 25, 50, 100)])
    assert [rises[0], rises[2], rises[3]] == pytest.approx([0.99, 0.995, 1.0])
    assert momentum_at(70, base=0.99, final=None, steps=100) == 0.99


@pytest.mark.parametrize("name", ["byol", "moco_v2", "dino"])
def test_the_target_is_the_moving_average_and_gets_no_gradient(name):
    state, options, batches = build(0, 1, overrides_of(name, "train.iterations=4"))
    seen = []
    state.objective.losses[name].register_forward_hook(lambda m, args, out: seen.append(args[1]))
    for step, batch in enumerate(batches[:4]):
        before = copy.deepcopy(state.objective.target.network)
        teacher = state.objective.losses[name].teacher_prototypes.clone() if name == "dino" else None
        result = train_step(state, batch, options)
        assert torch.equal(seen[-1], result.outputs["target"])
        m = momentum_at(step, base=0.9, final=None if name == "moco_v2" else 1.0, steps=4)
        online = PretrainingModel(state.model.encoder, {"projection": state.model.heads["projection"]})
        target = state.objective.target.network
        for old, new, weight in zip(before.parameters(), target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(new, m * old + (1 - m) * weight)
            assert new.grad is None
            assert not new.requires_grad
        if name == "dino":
            loss = state.objective.losses[name]
            torch.testing.assert_close(loss.teacher_prototypes, m * teacher + (1 - m) * loss.prototypes.detach())
    if name == "moco_v2":
        keys = state.objective.losses[name].keys
        torch.testing.assert_close(keys[:, :24], result.outputs["target"].transpose(0, 1))


def test_the_predictor_alone_keeps_its_learning_rate():
    state, _, _ = build(0, 1, overrides_of("simsiam, constant"))
    state.engine.set_learning_rate(0.003)
    predictor = {id(p) for p in state.model.heads["prediction"].parameters()}
    rates = {id(p): group["lr"] for group in state.engine._optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in state.model.parameters() if id(p) in predictor} == {0.1}
    assert {rates[id(p)] for p in state.model.parameters() if id(p) not in predictor} == {0.003}
    assert len(rates) == len(list(state.model.parameters()))


@pytest.mark.parametrize("name", FORMS)
def test_a_loaded_state_goes_on_with_the_same_bits(name):
    overrides = overrides_of(name, "train.iterations=5", "train.ema=0.9")
    whole, options, batches = build(0, 1, overrides)
    for batch in batches[:3]:
        train_step(whole, batch, options)
    tensors = {file: {key: t.clone() for key, t in found.items()} for file, found in whole.tensors().items()}
    resumed, _, _ = build(0, 1, [*overrides, "seed=9"])  # other weights, which are replaced
    resumed.load(tensors, whole.numbers())
    for state in (whole, resumed):
        state.values = [float(train_step(state, batch, options).loss) for batch in batches[3:]]
    assert resumed.values == whole.values
    for file, found in whole.tensors().items():
        for key, value in found.items():
            assert torch.equal(resumed.tensors()[file][key], value), (file, key)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_logged_tells_collapse(name):
    state, options, batches = build(0, 1, overrides_of(name))
    result = train_step(state, batches[0], options)
    numbers = state.objective.embedding_numbers(result.outputs, batches[0].labels)
    assert set(numbers) == {"mean_similarity", "alignment", "uniformity", "embedding_std", "effective_rank"}
    equal = {"projection": torch.ones(24, 2, 8)}
    numbers = state.objective.embedding_numbers(equal, batches[0].labels)
    assert float(numbers["embedding_std"]) == pytest.approx(0, abs=1e-6)
    assert float(numbers["effective_rank"]) == pytest.approx(1, abs=1e-3)
    # positives are the views of an image, not the images of its class
    apart = torch.eye(24, dtype=torch.float32)[:, None].expand(-1, 2, -1)
    assert float(state.objective.embedding_numbers({"projection": apart}, batches[0].labels)["alignment"]) == 0
