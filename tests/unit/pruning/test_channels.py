"""Removed channels: the smaller model against the masked one, what goes together, how many, and what is kept."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_supcon.errors import ConfigError, NonFinite, PruningError
from hpc_supcon.models import build_encoder, set_widths
from hpc_supcon.pruning import (
    CHANNEL_SCORES,
    PruneTask,
    apply_plan,
    channel_plan,
    channel_scores,
    check_plan,
    layer_widths,
    mask_channels,
    plan_digest,
    prunable,
    trace_channels,
)

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def conv(c_in, c_out, kernel=3, **options):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class Net(nn.Module):
    """`forward` of the modules given by name, which the test names."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def pooled(x):
    return x.mean((2, 3))


NETS = {
    "chain": lambda: Net(
        lambda s, x: s.last(s.b(s.a(x)).flatten(1)),
        a=conv(3, 7, bias=True), b=conv(7, 5, stride=8), last=nn.Linear(5 * 16, 4),
    ),
    "residual": lambda: Net(
        lambda s, x: s.last(pooled(s.c(s.a(x) + s.b(s.a(x))))), a=conv(3, 9), b=conv(9, 9), c=conv(9, 6),
        last=nn.Linear(6, 2),
    ),
    "grouped": lambda: Net(
        lambda s, x: s.last(pooled(s.c(s.b(s.a(x))))), a=conv(3, 12), b=conv(12, 18, groups=6), c=conv(18, 5),
        last=nn.Linear(5, 2),
    ),
    "depthwise": lambda: Net(
        lambda s, x: s.last(pooled(s.c(s.b(s.a(x))))), a=conv(3, 5), b=conv(5, 10, groups=5), c=conv(10, 7, 1),
        last=nn.Linear(7, 2),
    ),
    "concatenation": lambda: Net(
        lambda s, x: s.last(pooled(s.norm(torch.cat([s.a(x), x, s.b(s.a(x))], 1)))), a=conv(3, 5), b=conv(5, 6),
        norm=nn.BatchNorm2d(14), last=nn.Linear(14, 2),
    ),
    "gate": lambda: Net(
        lambda s, x: s.last(pooled(s.a(x) * torch.sigmoid(s.up(F.silu(s.down(s.a(x).mean((2, 3), keepdim=True))))))),
        a=conv(3, 8), down=nn.Conv2d(8, 3, 1), up=nn.Conv2d(3, 8, 1), last=nn.Linear(8, 2),
    ),
    "shared": lambda: Net(
        lambda s, x: s.last(pooled(s.b(s.b(s.a(x))))), a=conv(3, 7), b=nn.Conv2d(7, 7, 3), last=nn.Linear(7, 2)
    ),
    "channels last": lambda: Net(
        lambda s, x: s.last(s.a(x).permute(0, 2, 3, 1).amax((1, 2))), a=conv(3, 7), last=nn.Linear(7, 2)
    ),
}  # fmt: skip
ENCODERS = [
    "conv",
    "resnet9_small",
    "resnet18",
    "vgg16_bn_embed",
    "densenet121",
    "resnext50_32x4d",
    "mobilenetv3_small_050",
]


def randomized(model):
    """Statistics and affine parameters of BatchNorm that are not those of the start: a shift in every channel."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.detach().copy_(0.3 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def magnitudes(model):
    return {name: weight.detach().abs() for name, weight in prunable(model).items()}


def plan_of(model, rate, scope="layer", images=IMAGES):
    graph = trace_channels(model, images)
    return channel_plan(graph, channel_scores(graph, magnitudes(model), relative=True), rate, scope)


def narrow(model, plan):
    smaller = copy.deepcopy(model)
    set_widths(smaller, layer_widths(model.state_dict(), plan))
    smaller.load_state_dict(apply_plan(model.state_dict(), plan))
    return smaller


@torch.no_grad()
def masked(model, plan):
    """A copy whose convolutions and BatchNorms give zero in the channels that the plan leaves out."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
            and (keep := plan.get(f"{name}.weight", [None])[0]) is not None
        ):
            module.register_forward_hook(lambda m, args, out, keep=keep: only(out, keep))
    return model


def only(x, keep):
    kept = torch.zeros(x.shape[1])
    kept[keep] = 1
    return x * kept[:, None, None]


@pytest.mark.parametrize(("name", "scope"), [*product(NETS, ("layer", "global")), *product(ENCODERS, ("layer",))])
@torch.no_grad()
def test_the_smaller_model_computes_what_the_masked_one_does(name, scope):
    torch.manual_seed(0)
    model = randomized(NETS[name]() if name in NETS else build_encoder(name, image_size=32))
    plan = plan_of(model, 0.4, scope)
    smaller = narrow(model, plan)
    dense, expected, actual = model(IMAGES), masked(model, plan)(IMAGES), smaller(IMAGES)
    assert actual.shape == dense.shape, "features keep their width"
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert float((dense - expected).abs().max()) > 1e-3 * float(dense.abs().max()), "something was removed"
    by_parameters = copy.deepcopy(model)
    mask_channels(by_parameters, plan)
    torch.testing.assert_close(by_parameters(IMAGES), expected, rtol=1e-5, atol=1e-5)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    assert sizes[1] < 0.8 * sizes[0]
    assert check_plan(model, smaller, plan, IMAGES) <= 1e-5


def test_training_goes_on_with_the_smaller_model():
    torch.manual_seed(0)
    model = randomized(build_encoder("resnet18", image_size=32))
    smaller = narrow(model, plan_of(model, 0.7)).train()
    smaller(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())
    assert smaller.layer1[0].bn1.num_features == smaller.layer1[0].conv1.out_channels == 19


def test_channels_that_are_added_go_together():
    model = NETS["residual"]()
    axes = trace_channels(model, IMAGES).axes
    a, b = axes["a.0.weight", 0], axes["b.0.weight", 0]
    assert torch.equal(a, b)
    assert torch.equal(axes["c.0.weight", 1], a)
    assert all(torch.equal(axes[f"{n}.1.{t}", 0], a) for n in "ab" for t in ("weight", "bias", "running_mean"))
    assert ("last.weight", 0) not in axes
    assert torch.equal(axes["last.weight", 1], axes["c.0.weight", 0])


def test_a_group_of_channels_goes_as_a_whole():
    axes = trace_channels(NETS["grouped"](), IMAGES).axes
    before, after = axes["a.0.weight", 0].view(6, 2), axes["b.0.weight", 0].view(6, 3)
    assert len(before.unique()) == 6
    assert (before == before[:, :1]).all()
    assert (after == before[:, :1]).all()


def test_a_flattened_map_loses_the_columns_of_a_channel():
    axes = trace_channels(NETS["chain"](), IMAGES).axes
    assert torch.equal(axes["last.weight", 1], axes["b.0.weight", 0].repeat_interleave(16))


def test_images_in_a_concatenation_are_kept():
    axes = trace_channels(NETS["concatenation"](), IMAGES).axes
    assert axes["norm.weight", 0].tolist() == [*axes["a.0.weight", 0], 0, 0, 0, *axes["b.0.weight", 0]]


KEPT = {
    "halves of the channels": lambda s, x: s.b(torch.cat([s.a(x)[:, 3:], s.a(x)[:, :3]], 1)),
    "a shuffle": lambda s, x: s.b(s.a(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
    "a value that is not zero": lambda s, x: s.b(torch.sigmoid(s.a(x))),
    "a shift": lambda s, x: s.b(s.a(x) + 1),
    "a mean over channels": lambda s, x: s.b(s.a(x) - s.a(x).mean(1, keepdim=True)),
    "a norm over channels": lambda s, x: s.b(F.group_norm(s.a(x), 2)),
    "a weight that is changed": lambda s, x: s.b(F.conv2d(x, s.a.weight * 2)),
    "a pooling of channels": lambda s, x: s.b(F.max_pool2d(s.a(x).transpose(1, 3), 3, 1, 1).transpose(1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
@torch.no_grad()
def test_channels_that_cannot_go_alone_are_kept(what):
    torch.manual_seed(0)
    free = conv(4, 9)
    model = Net(
        lambda s, x: s.last(pooled(s.free(KEPT[what](s, x)))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 3), free=free,
        last=nn.Linear(9, 2),
    )  # fmt: skip
    randomized(model)
    axes = trace_channels(model, IMAGES).axes
    assert ("a.weight", 0) not in axes
    assert ("b.weight", 1) not in axes
    plan = plan_of(model, 0.5)
    assert len(plan["free.0.weight"][0]) == 5  # 4 of 9: half to even
    check_plan(model, narrow(model, plan), plan, IMAGES)


@pytest.mark.parametrize(
    ("rate", "scope"), [(0, "layer"), (0.3, "global"), (0.5, "layer"), (0.99, "layer"), (0.99, "global")]
)
def test_rates_and_the_channel_that_always_stays(rate, scope):
    torch.manual_seed(0)
    model = NETS["residual"]()
    plan = plan_of(model, rate, scope)
    kept = {
        name: len(plan.get(f"{name}.0.weight", [range(n)])[0] or []) for name, n in (("a", 9), ("b", 9), ("c", 6))
    }
    assert kept["a"] == kept["b"]
    if scope == "layer":
        assert (kept["a"], kept["c"]) == (max(1, 9 - round(rate * 9)), max(1, 6 - round(rate * 6)))
    else:
        assert kept["a"] + kept["c"] == max(2, 15 - round(rate * 15))


def test_the_smallest_scores_go_first_and_of_equal_ones_the_first():
    model = NETS["chain"]()
    graph = trace_channels(model, IMAGES)
    scores = torch.tensor([5.0, 1, 1, 1, 9, 2, 7, 4, 3, 3, 8, 6])
    assert channel_plan(graph, scores, 0.3, "layer")["a.0.weight"][0] == [0, 3, 4, 5, 6]
    plan = channel_plan(graph, scores, 0.5, "global")
    assert (plan["a.0.weight"][0], plan["b.0.weight"][0]) == ([0, 4, 6], [0, 3, 4])
    assert plan["b.0.weight"][1] == plan["a.0.bias"][0] == [0, 4, 6]


def test_scores_are_the_sums_of_the_filters_that_go_together():
    torch.manual_seed(0)
    model = NETS["residual"]()
    graph = trace_channels(model, IMAGES)
    weights = {name: w.detach().double() for name, w in prunable(model).items()}
    a, b, c = (weights[f"{n}.0.weight"].abs().sum((1, 2, 3)) for n in "abc")
    units_a, units_c = graph.axes["a.0.weight", 0] - 1, graph.axes["c.0.weight", 0] - 1
    plain = channel_scores(graph, magnitudes(model), relative=False)
    torch.testing.assert_close(plain[units_a], a + b)
    torch.testing.assert_close(plain[units_c], c)
    relative = channel_scores(graph, magnitudes(model), relative=True)
    torch.testing.assert_close(relative[units_a], (a / a.mean() + b / b.mean()) / 2)


def test_taylor_scores_are_the_mean_of_weight_times_gradient():
    weights = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]])}
    gradients = [{"w": torch.tensor([[1.0, 1.0], [2.0, 0.0]])}, {"w": torch.tensor([[-3.0, 1.0], [0.0, 1.0]])}]
    task = PruneTask(weights, gradients=lambda n: iter(gradients[:n]), n_batches=2)
    found = CHANNEL_SCORES["taylor"].score(task).scores["w"]
    assert found.tolist() == [[2.0, 2.0], [0.5, 1.5]]


def test_scores_that_are_not_finite_are_refused():
    model = NETS["chain"]()
    scores = magnitudes(model)
    scores["a.0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"scores of a\.0\.weight are NaN"):
        channel_scores(trace_channels(model, IMAGES), scores, relative=True)


def test_a_plan_is_plain_data_with_a_digest():
    model = randomized(NETS["chain"]())
    plan = plan_of(model, 0.5)
    again = json.loads(json.dumps(plan))
    assert again == plan
    assert plan_digest(again) == plan_digest(plan) != plan_digest(plan_of(model, 0.3))
    assert layer_widths(model.state_dict(), plan) == {
        "a.0": [3, 3], "a.1": [3], "b.0": [3, 3], "b.1": [3], "last": [4, 48],
    }  # fmt: skip


def test_a_plan_that_changes_the_outputs_is_found():
    model = randomized(NETS["chain"]())
    plan = plan_of(model, 0.5)
    smaller = narrow(model, plan)
    smaller.b[0].weight.detach()[0, 0] += 1
    with pytest.raises(PruningError, match="differ from those of the masked one by"):
        check_plan(model, smaller, plan, IMAGES)
    with pytest.raises(PruningError, match="cannot be computed with fewer channels"):
        check_plan(model, narrow(model, {name: d for name, d in plan.items() if "last" not in name}), plan, IMAGES)


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Branches, "cannot be traced"),
        (lambda: build_encoder("vit_tiny_patch16_224"), "no channel of VisionTransformer"),
    ],
)
def test_an_encoder_without_removable_channels_is_refused(model, said):
    with pytest.raises(ConfigError, match=f"prune.method=channels: .*{said}.*supported are convolutions"):
        trace_channels(model(), IMAGES)


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"layers.9": [3, 3]}, "layers.9: the encoder has no such layer"),
        ({"layers": [3]}, "layers: only convolutions"),
        ({"layers.0": [17, 3]}, r"layers.0: \[17, 3\] does not fit the layer's \[16, 3\]"),
        ({"layers.0": [0, 3]}, "does not fit"),
        ({"layers.0": [4]}, "does not fit"),
        ({"layers.0": [4.0, 3]}, "does not fit"),
        ({"layers.1": [4, 4]}, "does not fit"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, said):
    widths = {name.replace("layers.9", "layers.99"): sizes for name, sizes in widths.items()}
    with pytest.raises(ConfigError, match="model.channels: .*" + said.replace("layers.9", "layers.99")):
        build_encoder("resnet9_small", channels=widths)
