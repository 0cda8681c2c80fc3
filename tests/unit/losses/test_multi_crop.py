"""SwAV's queue and crops of two sizes, and DINO's teacher: against the formulas written densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpc_supcon import losses
from hpc_supcon.losses.swav import sinkhorn
from tests import brute_force

N, D, K, TAU = 5, 4, 6, 0.3


def rows(seed, n=N, views=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, views, D, generator=generator, dtype=torch.float64) * 1.7 + torch.arange(D)


def dino(**settings):
    return losses.DINOLoss(TAU, K, projection_dim=D, seed=3, **settings).double()


def assert_same(value, wanted, z, want):
    """Of losses of z and of its copy `want`: the values and the gradients."""
    value.backward(), wanted.backward()
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.grad, want.grad, rtol=1e-10, atol=1e-12)


# ---- SwAV


def test_local_views_predict_the_codes_of_global_ones_and_give_none():
    loss = losses.SwAVLoss(TAU, K, projection_dim=D, global_views=2, seed=3).double()
    z, want = rows(0).requires_grad_(), rows(0).requires_grad_()
    value, wanted = loss(z), brute_force.swav(want, loss.prototypes.detach(), TAU, given=2)
    assert_same(value, wanted, z, want)


def test_a_full_queue_shares_the_prototypes_from_its_epoch_on():
    loss = losses.SwAVLoss(
        TAU, K, queue_size=7, projection_dim=D, global_views=2, queue_start_steps=3, seed=3
    ).double()
    plain = losses.SwAVLoss(TAU, K, projection_dim=D, global_views=2, seed=3).double()
    pushed = []
    for step in range(5):
        z = rows(step).requires_grad_()
        value = loss(z)
        value.backward()
        held = torch.cat(pushed[::-1])[:7] if pushed else rows(0)[:0]
        if step >= 3:  # full since the second step
            queue = F.normalize(held[:, :2], dim=-1).transpose(0, 1)
            torch.testing.assert_close(loss.queue, queue)
            want = rows(step).requires_grad_()
            wanted = brute_force.swav(want, loss.prototypes.detach(), TAU, given=2, queue=queue)
            wanted.backward()
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(z.grad, want.grad, rtol=1e-10, atol=1e-12)
            assert abs(float((value - plain(z)).detach())) > 1e-4
        else:
            torch.testing.assert_close(value, plain(z))
        loss.after_step({"projection": z.detach()})
        pushed.append(z.detach())


def test_a_queue_that_is_not_full_is_not_used():
    loss = losses.SwAVLoss(TAU, K, queue_size=11, projection_dim=D, global_views=2, seed=3).double()
    plain = losses.SwAVLoss(TAU, K, projection_dim=D, global_views=2, seed=3).double()
    for step, used in enumerate((False, False, False, True)):  # 5, 10, 15 rows
        z = rows(step)
        assert (float(abs((loss(z) - plain(z)).detach())) > 1e-6) == used
        loss.after_step({"projection": z})


def test_codes_of_a_batch_and_a_queue_are_the_first_codes_of_both_together():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(12, K, generator=generator, dtype=torch.float64) * 2 - 1
    together, yes, no = sinkhorn(scores, 0.05, 3), torch.tensor(True), torch.tensor(False)
    torch.testing.assert_close(sinkhorn(scores[:4], 0.05, 3, past=scores[4:], used=yes), together[:4])
    torch.testing.assert_close(
        sinkhorn(scores[:4], 0.05, 3, past=scores[4:], used=no), sinkhorn(scores[:4], 0.05, 3), rtol=0, atol=0
    )


# ---- DINO


def test_all_views_predict_the_teachers_assignments_of_global_ones():
    loss = dino(teacher_temperature=0.05, teacher_warmup_epochs=0)
    loss.center.copy_(torch.linspace(-0.2, 0.1, K))
    z, want, target = rows(0).requires_grad_(), rows(0).requires_grad_(), rows(1, views=2).requires_grad_()
    own = loss.prototypes.detach().clone().requires_grad_()
    value = loss(z, target)
    wanted = brute_force.dino(want, target, own, loss.teacher_prototypes, loss.center, TAU, 0.05)
    assert_same(value, wanted, z, want)
    torch.testing.assert_close(loss.prototypes.grad, own.grad, rtol=1e-10, atol=1e-12)
    assert target.grad is None


def test_it_is_the_loss_of_the_authors_code():
    """As DINOLoss of main_dino.py computes it: scores of student and teacher in chunks of views."""
    loss = dino(teacher_temperature=0.06, teacher_warmup_epochs=0)
    z, target = rows(0), rows(1, views=2)
    loss.center.copy_(torch.linspace(-0.2, 0.1, K))
    student = F.normalize(z, dim=-1) @ F.normalize(loss.prototypes.detach(), dim=1).T / TAU
    teacher = F.normalize(target, dim=-1) @ F.normalize(loss.teacher_prototypes, dim=1).T
    teacher = F.softmax((teacher - loss.center) / 0.06, dim=-1)
    total, terms = 0.0, 0
    for iq in range(2):
        for v in range(5):
            if v != iq:
                total += torch.sum(-teacher[:, iq] * F.log_softmax(student[:, v], dim=-1), dim=-1).mean()
                terms += 1
    torch.testing.assert_close(loss(z, target).detach(), total / terms, rtol=1e-12, atol=0)
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    torch.testing.assert_close(loss.stats["teacher_entropy"], entropy, rtol=1e-12, atol=0)


def test_the_center_follows_the_mean_score_of_the_teacher():
    loss = dino(center_momentum=0.8)
    loss.teacher_prototypes.mul_(torch.arange(1, K + 1)[:, None])  # of which only directions count
    center = torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        target = rows(step, n=3 + step, views=2)
        loss.after_step({"target": target})
        scores = F.normalize(target, dim=-1).flatten(0, 1) @ F.normalize(loss.teacher_prototypes, dim=1).T
        center = 0.8 * center + 0.2 * scores.mean(0)
        torch.testing.assert_close(loss.center, center, rtol=1e-12, atol=1e-14)
    assert int(loss.steps) == 3


@pytest.mark.parametrize("epochs", [0, 1, 2, 4])
def test_the_teachers_temperature_rises_by_epochs_as_numpys_linspace(epochs):
    loss = dino(
        teacher_temperature=0.07, teacher_warmup_temperature=0.04, teacher_warmup_epochs=epochs, steps_per_epoch=3
    )
    want = np.concatenate([np.linspace(0.04, 0.07, epochs), np.full(6 - epochs, 0.07)])
    for step in range(18):
        assert float(loss._teacher_temperature()) == pytest.approx(want[step // 3], rel=1e-12)
        loss.after_step({"target": rows(0, views=2)})


def test_the_last_layer_is_frozen_at_first_and_of_unit_length():
    loss = dino(frozen_steps=2)
    for step in range(3):
        loss.zero_grad()
        loss(rows(0), rows(1, views=2)).backward()
        assert bool((loss.prototypes.grad != 0).any()) == (step == 2)
        loss.after_step({"target": rows(1, views=2)})
    value = loss(rows(0), rows(1, views=2))
    with torch.no_grad():
        loss.prototypes.mul_(7.0)
    torch.testing.assert_close(loss(rows(0), rows(1, views=2)), value)


def test_both_kinds_of_collapse_show_in_the_teachers_entropy():
    loss = dino(teacher_temperature=0.04, teacher_warmup_epochs=0)
    uniform = torch.zeros(N, 2, D, dtype=torch.float64)
    loss(rows(0), uniform)
    assert float(loss.stats["teacher_entropy"]) == pytest.approx(np.log(K))
    loss.center.copy_(torch.arange(K) * 3.0)
    loss(rows(0), rows(1, views=2))
    assert float(loss.stats["teacher_entropy"]) < 1e-6


def test_many_prototypes_are_no_overflow_in_fp32():
    loss = losses.DINOLoss(0.01, 4096, teacher_temperature=0.01, teacher_warmup_epochs=0, projection_dim=D)
    z = rows(0).float().requires_grad_()
    value = loss(z, rows(0, views=2).float())
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()
