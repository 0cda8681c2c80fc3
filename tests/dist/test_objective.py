"""A weighted sum of losses: its value is the sum of its parts, its gradient over ranks that of one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.losses import SupConLoss, TripletLoss
from hpc_supcon.models import PretrainingModel, build_encoder, build_head
from hpc_supcon.training.engine import distribute
from hpc_supcon.training.objective import Objective
from tests.dist.ranks import run_ranks

TERMS = {"supcon_out": 0.5, "cross_entropy": 2.0, "reconstruction": 0.25, "triplet": 1.5}
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 0, 2, 3, 1, 2, 2])  # each rank has other classes
SETTINGS = load_config().loss.model_dump() | {"mining": "hard", "temperature": 0.2}


def make():
    torch.manual_seed(0)
    encoder = build_encoder("conv", in_channels=1, image_size=8, out_dim=16)
    description = {
        "projection": {"hidden": 8, "out_dim": 8},
        "classes": list("abcd"),
        "encoder": {"name": "conv", "in_channels": 1, "image_size": 8},
    }
    heads = {head: build_head(head, description, 16) for head in ("projection", "classifier", "decoder", "features")}
    return PretrainingModel(encoder, heads).double(), torch.rand(12, 2, 1, 8, 8, dtype=torch.float64)


def one_rank(rank, world_size):
    model, x = make()
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    parallel = distribute(model, runtime, sync_bn=True)
    objective = Objective(TERMS, SETTINGS, denormalize=lambda views: views)
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    loss = objective(parallel(x[own]), x[own], LABELS[own])
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}, objective.statistics()


def test_a_sum_is_the_sum_of_its_parts():
    value, _, statistics = one_rank(0, 1)
    model, x = make()
    outputs = {name: out.detach() for name, out in model(x).items()}
    logits = outputs["classifier"].flatten(0, 1)
    error = outputs["decoder"] - (2 * x - 1)
    parts = {
        "supcon_out": SupConLoss(temperature=0.2)(outputs["projection"], LABELS),
        "cross_entropy": F.cross_entropy(logits, LABELS.repeat_interleave(2)),
        "reconstruction": 0.5 * error.square().mean() + 0.5 * error.abs().mean(),
        "triplet": TripletLoss(mining="hard")(outputs["features"], LABELS),
    }
    assert value == pytest.approx(float(sum(TERMS[name] * part for name, part in parts.items())), rel=1e-12)
    for name, part in parts.items():
        assert float(statistics[f"{name}_loss"]) == pytest.approx(float(part), rel=1e-12)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradient_of_a_sum_over_ranks_equals_one_process(world_size):
    want_value, want, _ = one_rank(0, 1)
    for value, got, _ in run_ranks(one_rank, world_size):
        assert value == pytest.approx(want_value, rel=1e-12)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", ["supcon_out", "tcl", "triplet"])
def test_unsupervised_an_images_views_are_its_positives(name):
    torch.manual_seed(1)
    outputs = {head: F.normalize(torch.randn(12, 3, 8), dim=2) for head in ("projection", "features")}
    queue = None if name == "triplet" else (F.normalize(torch.randn(5, 8), dim=1), torch.arange(5))
    settings = SETTINGS | {"supervised": False}
    got = Objective({name: 1.0}, settings)(outputs, None, LABELS, queue)
    as_negatives = None if queue is None else (queue[0], torch.arange(100, 105))  # classes of no image
    want = Objective({name: 1.0}, SETTINGS)(outputs, None, torch.arange(12), as_negatives)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert float(got) != pytest.approx(float(Objective({name: 1.0}, SETTINGS)(outputs, None, LABELS, queue)))


@pytest.mark.parametrize(
    ("terms", "more", "message"),
    [
        ("{supcon: 1.0}", [], "unknown loss.terms 'supcon'"),
        ("{simclr: 1.0, cross_entropy: 1.0}", ["data.views=1"], "simclr"),
        ("{cross_entropy: 1.0, triplet: 1.0}", ["loss.queue_size=64"], "takes no queue"),
        ("{cross_entropy: 1.0}", ["loss.supervised=false"], "needs their labels"),
        ("{tcl: 1.0}", ["loss.supervised=false", "data.views=1"], "data.views of 2"),
        ("{supcon_out: 1.0, tcl: 1.0}", ["log.gradient_response=true"], "gradient_response"),
        ("{supcon_out: 1.0, reconstruction: 1.0}", ["train.micro_batch_size=4"], "micro_batch_size"),
    ],
)
def test_sums_that_contradict_other_settings_are_refused(terms, more, message):
    with pytest.raises(ConfigError, match=message):
        load_config("default", ["model.encoder=conv", f"loss.terms={terms}", *more], stages=("pretrain",))


def numbers_of_views(rank, world_size, supervised):
    objective = Objective({"supcon_out": 1.0}, SETTINGS | {"supervised": supervised})
    generator = torch.Generator().manual_seed(3)
    projection = torch.randn(12, 2, 8, generator=generator)
    own = slice(0, 5) if rank == 0 and world_size > 1 else slice(5 if world_size > 1 else 0, 12)
    numbers = objective.embedding_numbers({"projection": projection[own]}, LABELS[own])
    return {name: float(value) for name, value in numbers.items()}


@pytest.mark.parametrize("supervised", [True, False])
def test_alignment_is_that_of_the_pairs_that_the_loss_pulls_together(supervised):
    projection = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(3))
    z = F.normalize(projection.double().flatten(0, 1), dim=1)
    groups = (LABELS if supervised else torch.arange(12)).repeat_interleave(2)
    distances = torch.cdist(z, z).square()
    positive = (groups[:, None] == groups) & ~torch.eye(24, dtype=torch.bool)
    want = float(distances[positive].mean())
    for ranks in (1, 2):
        found = run_ranks(numbers_of_views, ranks, supervised)
        assert all(numbers == found[0] for numbers in found)
        assert found[0]["alignment"] == pytest.approx(want, rel=1e-6)
        assert set(found[0]) == {"mean_similarity", "alignment", "uniformity", "embedding_std", "effective_rank"}
        assert found[0]["embedding_std"] == pytest.approx(float(z.std(0, correction=0).mean()) * 8**0.5, rel=1e-6)
