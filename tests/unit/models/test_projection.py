"""Projections and predictors have the layers of the papers, and the weights of older checkpoints fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_supcon.models import Predictor, Projection, build_model


def kinds(module):
    return [
        type(part).__name__ for part in module.modules() if isinstance(part, (nn.Linear, nn.BatchNorm1d, nn.ReLU))
    ]


def test_the_default_has_two_layers_rows_of_unit_length_and_the_names_of_older_checkpoints():
    head = Projection(4, 8, 3)
    assert set(head.state_dict()) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}
    torch.testing.assert_close(head(torch.randn(5, 4)).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("layers", "norm", "want"),
    [
        (2, "none", ["Linear", "ReLU", "Linear"]),
        (2, "hidden", ["Linear", "BatchNorm1d", "ReLU", "Linear"]),  # BYOL
        (3, "hidden", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]),  # Barlow Twins, VICReg
        (3, "all", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]),  # SimSiam
    ],
)
def test_layers_and_norms(layers, norm, want):
    head = Projection(4, 8, 3, layers, norm, unit=False)
    assert kinds(head) == want
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    assert [part.out_features for part in linear] == [8] * (layers - 1) + [3]
    z = head(torch.randn(50, 4))
    assert not torch.allclose(z.norm(dim=1), torch.ones(50))
    if norm == "all":
        assert not list(head.last.parameters())
        torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_dinos_head_has_gelu_and_its_initial_weights():
    torch.manual_seed(0)
    head = Projection(512, 2048, 256, 3, activation="gelu")  # and prototypes, which are the loss's
    assert sum(isinstance(part, nn.GELU) for part in head.modules()) == 2
    assert not any(isinstance(part, nn.ReLU) for part in head.modules())
    for layer in (part for part in head.modules() if isinstance(part, nn.Linear)):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        assert not layer.bias.any()
    torch.testing.assert_close(head(torch.randn(5, 512)).norm(dim=1), torch.ones(5))


def test_a_predictor_takes_the_projections_output():
    description = {
        "encoder": {"name": "conv", "in_channels": 3, "image_size": 8},
        "projection": {"hidden": 16, "out_dim": 6, "unit": False},
        "predictor": {"hidden": 4},
        "heads": ["projection", "prediction"],
        "classes": ["a", "b"],
    }
    model = build_model(description).eval()
    outputs = model(torch.rand(5, 2, 3, 8, 8))
    predictor = model.heads["prediction"]
    assert isinstance(predictor, Predictor)
    assert kinds(predictor) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    torch.testing.assert_close(
        outputs["prediction"], predictor(outputs["projection"].flatten(0, 1)).unflatten(0, (5, 2))
    )
