"""Encoder gradients through DDP, synchronized BatchNorm and the global loss equal those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch._dynamo.utils import counters

from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.losses import SupConLoss
from hpc_supcon.models import PretrainingModel, Projection, build_encoder, synchronize_batchnorm
from hpc_supcon.training.engine import distribute
from tests.dist.ranks import run_ranks

# A different class mix on every rank; class 7 has one image, so with one view it is an anchor without positive.
LABELS = [[0, 0, 1, 7], [1, 1, 1, 2], [2, 0, 2, 3], [3, 3, 0, 1]]


def make(views):
    torch.manual_seed(0)
    encoder = build_encoder("conv", in_channels=1, image_size=8)
    model = PretrainingModel(encoder, {"projection": Projection(encoder.feature_dim, 24, 8)}).double()
    x = torch.randn(16, views, 1, 8, 8, dtype=torch.float64)
    return model, x, torch.tensor(LABELS).flatten()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def one_rank(rank, world_size, views, backend):
    model, x, labels = make(views)
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    parallel = distribute(model, runtime, sync_bn=True)
    share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    loss = SupConLoss(temperature=0.2, backend=backend)(parallel(x[share])["projection"], labels[share])
    loss.backward()
    return float(loss.detach()), gradients(model), {k: v.clone() for k, v in model.named_buffers()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_gradient_of_several_ranks_equals_one_process(world_size, views):
    backend = "reference" if views == 2 else "tiled"
    want_loss, want, want_buffers = one_rank(0, 1, views, backend)
    for loss, got, buffers in run_ranks(one_rank, world_size, views, backend):
        assert loss == pytest.approx(want_loss, rel=1e-12)
        assert set(got) == set(want)
        for name in want:
            error = (got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-8)
            assert error <= 1e-10, f"{name}: {error:.2e}"
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, want_buffers[name], rtol=1e-10, atol=1e-12)


def uneven_batchnorm(rank, world_size, kind):
    torch.manual_seed(1)
    x = torch.randn(7, 5, 3, 3, dtype=torch.float64) * 3 + 10
    if kind == "1d":
        x = x[:, :, 0, 0]
    bn = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "2d with ReLU": BatchNormAct2d}[kind](5).double()
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2)
        bn.bias.uniform_(-1, 1)
    weights = torch.randn_like(x)
    bn = synchronize_batchnorm(bn, torch.device("cpu"))
    # 1 row on the first rank, the rest on the others
    bounds = [0, 1, 4, 7] if world_size == 3 else [0, 7]
    own = slice(bounds[rank], bounds[rank + 1])
    mine = x[own].clone().requires_grad_()
    y = bn(mine)
    (y * weights[own]).sum().backward()
    return y.detach(), mine.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var


@pytest.mark.parametrize("kind", ["1d", "2d", "2d with ReLU"])
def test_batchnorm_over_uneven_ranks_equals_pytorchs_on_the_whole_batch(kind):
    want = uneven_batchnorm(0, 1, kind)  # a world of one takes PyTorch's own path
    parts = run_ranks(uneven_batchnorm, 3, kind)
    close = {"rtol": 1e-10, "atol": 1e-11}
    for i in (0, 1):  # outputs and input gradients: side by side
        torch.testing.assert_close(torch.cat([p[i] for p in parts]), want[i], **close)
    for i in (2, 3):  # parameter gradients: local sums that add up
        torch.testing.assert_close(sum(p[i] for p in parts), want[i], **close)
    for part in parts:  # running statistics: the same on all ranks
        torch.testing.assert_close(part[4], want[4], **close)
        torch.testing.assert_close(part[5], want[5], **close)


class Layers(nn.Sequential):
    """Four BatchNorms, one of which contains its activation."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__()
        for channels in (3, 16, 16):
            norm = [nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
            self.extend([nn.Conv2d(channels, 16, 3, 1, 1, bias=False), *norm])
        self.extend([nn.Conv2d(16, 16, 3, bias=False), BatchNormAct2d(16)])


def compiled_and_plain(rank, world_size):
    """Of two ranks with 3 and 5 images: (graphs that layers were cut into, everything compiled, all of it plain)."""
    torch.manual_seed(5 + rank)
    x = torch.randn(6 + 2 * rank, 3, 32, 32)
    found = []
    for compiled in (True, False):
        model = synchronize_batchnorm(Layers(), torch.device("cpu"), compiled=True)
        assert sum(type(m).__name__.startswith("GlobalBatchNorm") for m in model) == 4
        counters.clear()
        run = torch.compile(model, dynamic=False) if compiled else model
        y = run(x)
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
        graphs = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((graphs, [{"output": y.detach()}, gradients, dict(model.named_buffers())]))
    return found


def test_torch_compile_makes_one_graph_of_layers_with_global_batchnorm_and_changes_nothing():
    for (graphs, compiled), (_, plain) in run_ranks(compiled_and_plain, 2):
        assert graphs == (1, 0)
        for got, want in zip(compiled, plain, strict=True):
            assert got.keys() == want.keys()
            for name, value in want.items():
                assert (got[name] - value).float().norm() <= 1e-3 * value.float().norm().clamp(min=1), name


def test_on_cuda_a_model_that_will_be_compiled_gets_the_batchnorm_that_is_traced():
    cuda = torch.device("cuda")
    model = synchronize_batchnorm(Layers(), cuda, compiled=True)
    kinds = [type(m) for m in model]
    assert [type(m) for m in synchronize_batchnorm(model, cuda)] == kinds  # the wrapper of all ranks asks again
    assert "SyncBatchNorm" not in [kind.__name__ for kind in kinds]
    assert "SyncBatchNorm" in [type(m).__name__ for m in synchronize_batchnorm(Layers(), cuda)]


def statistics_held_still(rank, world_size):
    bn = synchronize_batchnorm(nn.BatchNorm2d(5), torch.device("cpu"))
    bn.track_running_stats = False
    bn(torch.randn(3, 5, 2, 2) + rank)
    return bn.running_mean, bn.num_batches_tracked


def test_statistics_that_are_not_tracked_stay_still_on_several_ranks():
    for mean, batches in run_ranks(statistics_held_still, 2):
        assert mean.eq(0).all()
        assert batches == 0


def test_synchronizing_keeps_names_and_values_and_a_single_process_result():
    model, x, _ = make(2)
    other = synchronize_batchnorm(copy.deepcopy(model), torch.device("cpu"))
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other(x)["projection"], model(x)["projection"])
