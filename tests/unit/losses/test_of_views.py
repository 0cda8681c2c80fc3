"""Barlow Twins, VICReg, SimSiam, BYOL, MoCo, SwAV, DINO on one process: the papers' formulas, degenerate batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpc_supcon import losses
from hpc_supcon.errors import LossInputError
from hpc_supcon.losses.swav import sinkhorn
from tests import brute_force

N, D, TAU = 5, 4, 0.3


def rows(seed, n=N, views=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, views, D, generator=generator, dtype=dtype) * 1.7 + torch.arange(D)


def make(name, views=2):
    if name == "moco_v2":
        return losses.MoCoLoss(TAU, 7, projection_dim=D, views=views, seed=3).double()
    if name == "swav":
        return losses.SwAVLoss(TAU, 3, projection_dim=D, global_views=views, seed=3).double()
    if name == "dino":
        loss = losses.DINOLoss(TAU, 6, 0.07, 0.04, 3, projection_dim=D, seed=3).double()
        generator = torch.Generator().manual_seed(8)
        loss.teacher_prototypes.add_(torch.randn(6, D, generator=generator, dtype=torch.float64))
        loss.center.copy_(torch.linspace(-0.1, 0.3, 6))
        return loss
    return losses.LOSSES[name].factory()


def formula(name, first, second=None, loss=None):
    if name == "barlow_twins":
        return brute_force.barlow_twins(first, 0.005)
    if name == "vicreg":
        return brute_force.vicreg(first, 25.0, 25.0, 1.0)
    if name == "moco_v2":
        return brute_force.moco(first, second, loss.keys, TAU)
    if name == "swav":
        return brute_force.swav(first, loss.prototypes.detach(), TAU)
    if name == "dino":
        own = loss.prototypes.detach(), loss.teacher_prototypes, loss.center
        return brute_force.dino(first, second, *own, TAU, 0.04)
    return getattr(brute_force, name)(first, second)


OF_VIEWS = [name for name, spec in losses.LOSSES.items() if spec.of_views]


def arguments(name, seed=0, **kwargs):
    """What the loss reads, the first one with a gradient."""
    first = rows(seed, **kwargs).requires_grad_()
    return [first] if losses.LOSSES[name].other is None else [first, rows(seed + 1, **kwargs).requires_grad_()]


@pytest.mark.parametrize("name", OF_VIEWS)
def test_value_and_gradient_are_the_formulas(name):
    loss, read = make(name), arguments(name)
    loss(*read).backward()
    want = [x.detach().clone().requires_grad_() for x in read]
    value = formula(name, *want, loss=loss)
    value.backward()
    torch.testing.assert_close(loss(*read).detach(), value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read[0].grad, want[0].grad, rtol=1e-10, atol=1e-12)
    assert all(x.grad is None for x in read[1:])  # targets get no gradient


@pytest.mark.parametrize("name", [name for name in OF_VIEWS if name != "swav"])  # its codes are constants
def test_gradients_pass_gradcheck(name):
    loss, read = make(name), arguments(name, seed=5)
    assert torch.autograd.gradcheck(lambda x: loss(x, *(other.detach() for other in read[1:])), read[0])


@pytest.mark.parametrize("name", OF_VIEWS)
def test_three_views_are_the_mean_over_pairs_of_views(name):
    read = [x.detach() for x in arguments(name, views=3)]
    loss = make(name, 3)
    pairs = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pair = [x[:, [a, b]] for x in read]
        if name == "moco_v2":
            two = make(name)
            two.keys.copy_(loss.keys[[a, b]])
            pairs.append(two(*pair))
        else:
            pairs.append(make(name)(*pair))
    torch.testing.assert_close(loss(*read), torch.stack(pairs).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_correlations_of_a_single_image_are_refused(name):
    with pytest.raises(LossInputError, match="at least 2 images; got 1"):
        make(name)(rows(0, n=1))


@pytest.mark.parametrize("name", OF_VIEWS)
def test_one_view_is_refused(name):
    with pytest.raises(LossInputError, match="V >= 2"):
        make(name)(*(x[:, :1] for x in arguments(name)))


@pytest.mark.parametrize("name", OF_VIEWS)
@pytest.mark.parametrize("case", ["identical rows", "a constant dimension", "zeros"])
def test_degenerate_batches_have_finite_values_and_gradients(name, case):
    loss, read = make(name).float(), [x.detach().float() for x in arguments(name)]
    for x in read:
        if case == "identical rows":
            x[:] = x[0, 0].clone()
        elif case == "a constant dimension":
            x[..., 1] = 2.5
        else:
            x.zero_()
    read[0].requires_grad_()
    value = loss(*read)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(read[0].grad).all()
    if name == "barlow_twins" and case != "a constant dimension":
        assert float(value.detach()) == pytest.approx(D)  # no correlation at all
    if name == "vicreg" and case != "a constant dimension":
        assert float(loss.stats["variance_term"]) == pytest.approx(2 * (1 - 1e-2), rel=1e-5)


def test_views_that_agree_without_redundancy_cost_nothing():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    z = torch.stack([signs, signs], dim=1)
    assert float(losses.BarlowTwinsLoss()(z)) < 1e-9
    assert float(losses.VICRegLoss()(z)) == 0
    assert float(losses.SimSiamLoss()(z, z)) == pytest.approx(-1)
    assert float(losses.BYOLLoss()(z, z)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", OF_VIEWS)
def test_half_precision_embeddings_are_computed_in_fp32_under_autocast(name):
    loss, read = make(name).float(), [x.detach().bfloat16() for x in arguments(name)]
    want = loss(*(x.float() for x in read))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(*read)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_queue_holds_the_newest_keys_of_each_view():
    loss = losses.MoCoLoss(TAU, 7, projection_dim=D)
    assert torch.equal(loss.keys, losses.MoCoLoss(TAU, 7, projection_dim=D).keys)
    torch.testing.assert_close(loss.keys.norm(dim=-1), torch.ones(2, 7))
    first, second, many = (rows(seed, n=n, dtype=torch.float32) for seed, n in ((1, 3), (2, 5), (3, 9)))
    loss.after_step({"target": first})
    loss.after_step({"target": second})
    held = F.normalize(torch.cat([second, first[:2]]), dim=-1).transpose(0, 1)
    torch.testing.assert_close(loss.keys, held)
    loss.after_step({"target": many})
    torch.testing.assert_close(loss.keys, F.normalize(many[:7], dim=-1).transpose(0, 1))


def test_prototypes_are_trained_after_their_frozen_steps():
    loss = losses.SwAVLoss(TAU, 3, projection_dim=D, seed=3, frozen_steps=2).double()
    free = make("swav")
    for step in range(3):
        x, y = rows(4).requires_grad_(), rows(4).requires_grad_()
        loss.zero_grad(), free.zero_grad()
        torch.testing.assert_close(loss(x), free(y))
        loss(x).backward(), free(y).backward()
        torch.testing.assert_close(x.grad, y.grad)
        want = free.prototypes.grad if step == 2 else torch.zeros_like(free.prototypes)
        torch.testing.assert_close(loss.prototypes.grad, want)
        loss.after_step({})
    want = rows(4), free.prototypes.detach().requires_grad_()
    brute_force.swav(want[0], want[1], TAU).backward()
    torch.testing.assert_close(free.prototypes.grad, want[1].grad)


def test_codes_sum_to_one_and_share_the_prototypes():
    codes = sinkhorn(F.cosine_similarity(rows(1, n=40)[:, :1], rows(2, n=5)[:, 0][None], dim=-1), 0.05, 50)
    torch.testing.assert_close(codes.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((5,), 8.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_std_of_embeddings_tells_collapse_from_spread():
    spread = torch.randn(4000, 2, 8, generator=torch.Generator().manual_seed(0))
    assert float(losses.embedding_std(spread)) == pytest.approx(1, abs=0.02)
    assert float(losses.embedding_std(torch.ones(5, 2, 8))) == pytest.approx(0, abs=1e-7)
    z = F.normalize(spread.double().flatten(0, 1), dim=1)
    want = z.std(0, correction=0).mean() * 8**0.5
    assert float(losses.embedding_std(spread)) == pytest.approx(float(want), rel=1e-6)
