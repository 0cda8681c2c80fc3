"""What is asked of encoders, losses, policies, probes and loggers of a user's own, and what is said of wrong ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from hpc_supcon import parts
from hpc_supcon.data import Views
from hpc_supcon.errors import LossInputError, PartError
from hpc_supcon.evaluation.probes.own_probe import OwnHead, _make
from hpc_supcon.losses.own_loss import OwnLoss
from hpc_supcon.models import build_encoder
from hpc_supcon.training.loggers import OwnLogger, open_logger

pytestmark = pytest.mark.usefixtures("own_code")
HERE = "tests.own_parts:"


@pytest.fixture(autouse=True)
def _allowed(own_code):
    names = ("Tiny", "not_a_module", "ProxyLoss", "Erase", "Means", "Lines", "shapes")
    parts.allow([HERE + name for name in names], "a test")


def encoder(**options):
    return build_encoder(HERE + "Tiny", in_channels=1, image_size=9, options=options)


def test_an_encoder_is_built_with_its_options_and_tried_without_a_trace():
    torch.manual_seed(1)
    built = encoder(width=5)
    state = torch.get_rng_state()
    assert (built.feature_dim, built.stem_kind, built.output_layers) == (5, "own", ())
    assert int(built.norm.num_batches_tracked) == 0
    assert built.training
    torch.manual_seed(1)
    again = encoder(width=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))
    assert build_encoder(HERE + "Tiny", image_size=9, out_dim=3)(torch.zeros(2, 3, 9, 9)).shape == (2, 3)
    assert build_encoder(HERE + "Tiny", image_size=9, input_size=17)(torch.zeros(2, 3, 9, 9)).shape == (2, 8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("maps", r"maps images \[2, 1, 9, 9\] to \[2, 8, 5, 5\], not to \[2, 8\], \[N, feature_dim\]"),
        ("list", r"to list, not to \[2, 8\]"),
        ("integers", "features are torch.int64, not floating point"),
        ("no width", "its attribute feature_dim is None: set it to the size of its features"),
        ("other width", r"to \[2, 8\], not to \[2, 3\]"),
        ("raises", r"failed: ValueError: cannot \(own_parts.py, line \d+\)"),
    ],
)
def test_an_encoder_with_another_output_is_refused_when_it_is_built(wrong, said):
    with pytest.raises(PartError, match=said):
        encoder(wrong=wrong)


def test_an_encoder_that_is_no_module_or_of_another_width_is_refused():
    with pytest.raises(PartError, match=r"returned function, not a torch.nn.Module"):
        build_encoder(HERE + "not_a_module", image_size=9)
    with pytest.raises(
        PartError, match=r"model.out_dim=4, but its feature_dim is 3: make it return out_dim features"
    ):
        build_encoder(HERE + "Tiny", image_size=9, out_dim=4, options={"wrong": "other width"})


def loss(views=2, **options):
    part = parts.find("losses", HERE + "ProxyLoss")
    return OwnLoss(part, options={part.name: options}, projection_dim=8, views=views)


def test_a_loss_is_tried_without_a_trace():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    built = loss(views=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert built.module.proxies.grad is None
    z = nn.functional.normalize(torch.randn(4, 1, 8), dim=-1).requires_grad_()
    value = built(z, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(value, copy.deepcopy(built.module)(z, torch.tensor([0, 0, 1, 1])))


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (
            "rows",
            PartError,
            r"returned torch.float32 \[8\], not the loss of the batch, a tensor of no dimension: take the",
        ),
        ("number", PartError, "returned float, not the loss of the batch"),
        ("integer", PartError, r"returned torch.int64 \[\]"),
        ("constant", PartError, "its value does not depend on the embeddings, so nothing would be trained"),
        ("nan", LossInputError, "its gradient is NaN or Inf"),
    ],
)
def test_a_wrong_loss_is_refused_before_training(wrong, error, said):
    with pytest.raises(error, match=said):
        loss(wrong=wrong)


def test_a_constant_loss_of_one_batch_is_a_zero_gradient():
    built = loss()
    built.module.wrong = "constant"
    z = torch.randn(4, 2, 8, requires_grad=True)
    built(z, torch.arange(4)).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def views(count=2, **options):
    return Views(count, 8, mean=[0.0], std=[1.0], policy=HERE + "Erase", options=options, seed=5)


IMAGES = torch.randint(60, 255, (6, 1, 10, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_a_policy_changes_cropped_and_flipped_views():
    found = views(size=3)(IMAGES)
    assert found.shape == (6, 2, 1, 8, 8)
    black = (found == 0).flatten(2)
    assert black.sum(-1).eq(9).all()
    assert len({tuple(row.tolist()) for row in black.flatten(0, 1)}) > 6  # not one square for all
    plain = Views(2, 8, mean=[0.0], std=[1.0], policy="flip_crop", seed=5)(IMAGES)
    # crops and flips are those of flip_crop, on whole gray levels
    torch.testing.assert_close(found[found > 0], (plain.mul(255).round() / 255)[found > 0], rtol=0, atol=1e-6)


def test_views_of_a_policy_follow_from_the_seed_alone():
    policy = views()
    first = policy(IMAGES)
    assert not torch.equal(policy(IMAGES), first)
    torch.manual_seed(9)
    policy.reseed(5)
    assert torch.equal(policy(IMAGES), first)
    # the two passes of a step render a piece twice
    drawn = policy.draw(6, 10, 10)
    piece = slice(2, 5)
    renders = [policy.render(IMAGES[piece], policy.select(drawn, piece)) for _ in range(2)]
    assert torch.equal(*renders)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("floats", r"made torch.float32 \[4, 1, 8, 8\] of torch.uint8 \[4, 1, 8, 8\]: keep type and shape"),
        ("crops", r"made torch.uint8 \[4, 1, 8, 7\]"),
        ("global generator", "gives other views for a generator of the same seed: draw all that is random from"),
    ],
)
def test_a_wrong_policy_is_refused_when_it_is_built(wrong, said):
    with pytest.raises(PartError, match=said):
        views(wrong=wrong)


def fitted(**options):
    where, probe = _make(HERE + "Means", options)
    features = torch.eye(3).repeat(4, 1)
    probe.fit(features, torch.arange(3).repeat(4))
    return OwnHead(where, probe, 3), features


def test_a_probe_predicts_logits_or_the_numbers_of_classes():
    for options in ({}, {"wrong": "numbers"}, {"power": 1.0}):
        head, features = fitted(**options)
        assert head(features).shape == (12, 3)
        assert head(features).argmax(1).tolist() == [0, 1, 2] * 4
    with pytest.raises(
        PartError, match=r"predict returned torch.float32 \[12, 1\] for 12 rows and 3 classes: give classes"
    ):
        fitted(wrong="shape")[0](features)


def test_a_classifier_of_scikit_learn_is_a_probe_with_its_own_probabilities():
    parts.allow(["sklearn.linear_model:LogisticRegression"], "a test")
    where, probe = _make("sklearn.linear_model:LogisticRegression", {"C": 2.0})
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    probe.fit(torch.from_numpy(x), torch.from_numpy(y))
    expected = LogisticRegression(C=2.0).fit(x, y).predict_proba(x)
    found = OwnHead(where, probe, 3)(torch.from_numpy(x)).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_probe_without_fit_is_refused():
    parts.allow(["collections:Counter"], "a test")
    with pytest.raises(
        PartError, match=r"returned Counter, which has no method fit: a probe has fit\(features, labels\)"
    ):
        _make("collections:Counter", {})


def test_a_logger_gets_every_event_and_its_errors_end_nothing(tmp_path, capsys):
    logger = open_logger(HERE + "Lines", tmp_path, None)
    assert isinstance(logger, OwnLogger)
    logger.write("train", 3, {"loss": 1.0})
    assert (tmp_path / "lines.txt").read_text() == "train 3\n"
    logger._logger.file = tmp_path / "missing" / "lines.txt"
    logger.write("train", 4, {})
    logger.write("train", 5, {})
    logger.close()
    err = capsys.readouterr().err
    assert err.count("the run goes on without this logger") == 1
    assert "FileNotFoundError" in err
