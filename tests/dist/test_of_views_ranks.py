"""Losses of views over real ranks: values and gradients of unequal batches are those of one process."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.errors import LossInputError
from tests.dist.ranks import run_ranks

D = 6
IMAGES = [5, 2, 8]
CASES = [(name, 2) for name, spec in losses.LOSSES.items() if spec.of_views]
CASES += [(name, 5) for name, spec in losses.LOSSES.items() if spec.multi_crop]
"""Losses, and numbers of views; two of them are global."""


def shards(world_size, views=2):
    """(first, second output) [n_r, views, D] of every rank: unequal sizes, each with its own mean and scale."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for rank, n in enumerate(IMAGES[:world_size]):
        center = torch.randn(D, generator=generator, dtype=torch.float64)
        draw = torch.randn(2, n, views, D, generator=generator, dtype=torch.float64)
        found.append(tuple(draw * (1 + rank) + center))
    return found


def value_and_gradient(name, first, second, images_per_rank=None):
    factory = losses.LOSSES[name].factory
    settings = {"moco_v2": {}, "swav": {"queue_size": 9, "global_views": 2}, "dino": {"teacher_warmup_epochs": 2}}
    loss = (factory(0.3, 7, projection_dim=D, seed=3, **settings[name]) if name in settings else factory()).double()
    second = second[:, :2]
    if name in ("swav", "dino"):  # a full queue, a center that is not 0, a teacher that is not the student
        if name == "dino":
            loss.teacher_prototypes.add_(torch.linspace(0, 0.5, D))
        for _ in range(4):
            loss.after_step({"projection": first, "target": second}, images_per_rank)
    first = first.clone().requires_grad_()
    read = [first] if losses.LOSSES[name].other is None else [first, second]
    value = loss(*read, images_per_rank=images_per_rank)
    value.backward()
    if name in settings:
        loss.after_step({"projection": first, "target": second}, images_per_rank)
    stats = {key: float(number) for key, number in getattr(loss, "stats", {}).items()}
    return value.detach(), first.grad, stats, dict(loss.state_dict()), [p.grad for p in loss.parameters()]


def all_losses(rank, world_size, known):
    sizes = IMAGES[:world_size] if known else None
    return {(name, views): value_and_gradient(name, *shards(world_size, views)[rank], sizes) for name, views in CASES}


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
    for case in CASES:
        everything = [torch.cat(parts) for parts in zip(*shards(world_size, case[1]), strict=True)]
        value, grad, stats, state, own = value_and_gradient(case[0], *everything)
        for result in ranks:
            torch.testing.assert_close(result[case][0], value, rtol=1e-10, atol=0)
            assert result[case][2] == pytest.approx(stats, rel=1e-10), case
            for key, held in state.items():  # a center is a sum over ranks; all else is copied
                rounding = 1e-12 if key == "center" else 0
                torch.testing.assert_close(result[case][3][key], held, rtol=rounding, atol=rounding)
                assert torch.equal(result[case][3][key], ranks[0][case][3][key])
        for index, wanted in enumerate(own):
            mean = sum(result[case][4][index] for result in ranks) / world_size
            torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-12, msg=str(case))
        got = torch.cat([result[case][1] for result in ranks]) / world_size
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-10 * float(grad.abs().max()), msg=str(case))


def test_ranks_refuse_a_single_image_together_and_measure_spread_together():
    first, second = run_ranks(lonely, 2)
    assert first[0] == second[0]
    assert len(first[0]) == 2
    want = float(losses.embedding_std(torch.cat([first[1], second[1]])))
    assert first[2] == second[2] == pytest.approx(want, rel=1e-12)
