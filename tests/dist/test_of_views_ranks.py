"""Losses of views over real ranks: values and gradients of unequal batches are those of one process."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.errors import LossInputError
from tests.dist.ranks import run_ranks

D = 6
IMAGES = [5, 2, 8]
NAMES = [name for name, spec in losses.LOSSES.items() if spec.of_views]


def shards(world_size):
    """(first, second output) [n_r, 2, D] of every rank: unequal sizes, each with a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for rank, n in enumerate(IMAGES[:world_size]):
        center = torch.randn(D, generator=generator, dtype=torch.float64)
        draw = torch.randn(2, n, 2, D, generator=generator, dtype=torch.float64)
        found.append(tuple(draw * (1 + rank) + center))
    return found


def value_and_gradient(name, first, second, images_per_rank=None):
    factory = losses.LOSSES[name].factory
    loss = (factory(0.3, 7, projection_dim=D, seed=3) if name in ("moco_v2", "swav") else factory()).double()
    first = first.clone().requires_grad_()
    read = [first] if losses.LOSSES[name].other is None else [first, second]
    value = loss(*read, images_per_rank=images_per_rank)
    value.backward()
    if name == "moco_v2":
        loss.after_step({"target": second}, images_per_rank)
    stats = {key: float(number) for key, number in getattr(loss, "stats", {}).items()}
    return value.detach(), first.grad, stats, dict(loss.state_dict()), [p.grad for p in loss.parameters()]


def all_losses(rank, world_size, known):
    own = shards(world_size)[rank]
    sizes = IMAGES[:world_size] if known else None
    return {name: value_and_gradient(name, *own, sizes) for name in NAMES}


def lonely(rank, world_size):
    """One image in all: rank 1 has none."""
    errors = []
    for name in ("barlow_twins", "vicreg"):
        try:
            losses.LOSSES[name].factory()(torch.ones(1 - rank, 2, D))
        except LossInputError as error:
            errors.append(str(error))
    z = torch.randn(3 - rank, 2, D, generator=torch.Generator().manual_seed(rank))
    return errors, z, float(losses.embedding_std(z))


@pytest.mark.parametrize(("world_size", "known"), [(2, True), (3, False)])
def test_value_and_gradient_of_unequal_ranks_equal_one_process(world_size, known):
    ranks = run_ranks(all_losses, world_size, known)
    everything = [torch.cat(parts) for parts in zip(*shards(world_size), strict=True)]
    for name in NAMES:
        value, grad, stats, state, own = value_and_gradient(name, *everything)
        for result in ranks:
            torch.testing.assert_close(result[name][0], value, rtol=1e-10, atol=0)
            assert result[name][2] == pytest.approx(stats, rel=1e-10), name
            for key, held in state.items():
                torch.testing.assert_close(result[name][3][key], held, rtol=0, atol=0)
        for index, wanted in enumerate(own):
            mean = sum(result[name][4][index] for result in ranks) / world_size
            torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-12, msg=name)
        got = torch.cat([result[name][1] for result in ranks]) / world_size
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-10 * float(grad.abs().max()), msg=name)


def test_ranks_refuse_a_single_image_together_and_measure_spread_together():
    first, second = run_ranks(lonely, 2)
    assert first[0] == second[0]
    assert len(first[0]) == 2
    want = float(losses.embedding_std(torch.cat([first[1], second[1]])))
    assert first[2] == second[2] == pytest.approx(want, rel=1e-12)
