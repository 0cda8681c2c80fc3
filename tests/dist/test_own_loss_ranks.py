"""A loss of a user's own, written for one process: value and gradients of ranks are those of one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hpc_supcon import parts
from hpc_supcon.config import load_config
from hpc_supcon.distributed.collectives import all_sum
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.models import PretrainingModel, build_encoder, build_head
from hpc_supcon.training.engine import distribute
from hpc_supcon.training.objective import Objective
from tests.dist.ranks import run_ranks
from tests.own_parts import ProxyLoss

NAME, NOISE = "tests.own_parts:ProxyLoss", "tests.own_parts:Noise"
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 0, 2, 3, 1, 2, 2, 3])  # each rank has other classes
EDGES = {1: [0, 13], 2: [0, 4, 13], 3: [0, 2, 9, 13]}
"""Ranks have batches of other sizes."""


def make():
    torch.manual_seed(0)
    encoder = build_encoder("conv", in_channels=1, image_size=8, out_dim=16)
    description = {"projection": {"hidden": 8, "out_dim": 8}}
    model = PretrainingModel(encoder, {"projection": build_head("projection", description, 16)}).double()
    return model, torch.rand(13, 2, 1, 8, 8, dtype=torch.float64)


def objective_of(terms, options):
    parts.allow([NAME, NOISE], "a test")
    settings = load_config().loss.model_dump() | {"options": options, "projection_dim": 8, "views": 2}
    return Objective(terms, settings).double()


def one_rank(rank, world_size, known_sizes, supervised):
    model, x = make()
    parallel = distribute(model, Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu")), sync_bn=True)
    objective = objective_of({NAME: 2.0, "supcon_out": 0.5}, {NAME: {"proxies": 13}})
    objective.supervised = supervised
    edges = EDGES[world_size]
    own = slice(edges[rank], edges[rank + 1])
    sizes = [b - a for a, b in pairwise(edges)] if known_sizes else None
    loss = objective(parallel(x[own]), x[own], LABELS[own], None, sizes)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    # as the training step does with the parameters of losses
    gradients |= {n: all_sum(p.grad) / world_size for n, p in objective.named_parameters()}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("supervised", [True, False], ids=["classes", "images"])
@pytest.mark.parametrize("known_sizes", [True, False], ids=["sizes known", "sizes gathered"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_value_and_gradients_of_ranks_are_those_of_one_process(ranks, known_sizes, supervised):
    value, gradients = one_rank(0, 1, known_sizes, supervised)
    for found, own in run_ranks(one_rank, ranks, known_sizes, supervised):
        assert found == pytest.approx(value, rel=1e-12)
        for name, gradient in gradients.items():
            assert (own[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def test_one_process_computes_the_loss_as_it_is_written():
    model, x = make()
    output = model(x)["projection"]
    found = objective_of({NAME: 1.0}, {NAME: {}})({"projection": output}, x, LABELS)
    assert found.item() == pytest.approx(ProxyLoss().double()(output, LABELS).item(), rel=1e-12)


def noisy(rank, world_size):
    torch.manual_seed(rank)  # as the training step seeds them
    objective = objective_of({NOISE: 1.0}, {NOISE: {}})
    z = torch.nn.functional.normalize(torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(rank)), dim=-1)
    z = z.double().requires_grad_()
    loss = objective({"projection": z}, None, LABELS[:4])
    loss.backward()
    return float(loss.detach()), float(z.grad.abs().sum())


def test_a_loss_that_draws_random_numbers_has_one_value_on_all_ranks():
    (first, gradient), (second, _) = run_ranks(noisy, 2)
    assert first == second
    assert gradient > 0
