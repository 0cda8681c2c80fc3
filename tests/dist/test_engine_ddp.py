"""The engine ddp: equal weights on any number of ranks, compiled or with checkpointed activations; loss scaling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_supcon.errors import NonFinite
from hpc_supcon.models import build_encoder
from hpc_supcon.training.engine.base import GROWTH_STEPS, INITIAL_SCALE, MOST_SKIPS, LossScale
from hpc_supcon.training.step import train_step
from tests.dist.engine_runs import Case, assert_same, run_all, run_case
from tests.dist.test_step import build

PLAIN = ["augment.policy=none", "loss.learnable_temperature=true"]  # the same views on any number of ranks
# eps: without it Adam makes whole steps of the rounding in the smallest gradients
OPTIMIZERS = {
    "sgd": ["optim.name=sgd", "optim.lr=0.1"],
    "adamw": ["optim.name=adamw", "optim.lr=0.003", "optim.eps=1e-3"],
    "lars": ["optim.name=lars", "optim.lr=0.1", "optim.lars_eta=0.1"],
    "lamb": ["optim.name=lamb", "optim.lr=0.01", "optim.eps=1e-3"],
}


@pytest.fixture(scope="module")
def one_rank():
    return {
        (name, dtype): run_case(0, 1, Case(PLAIN, settings, smooth=dtype))
        for name, settings in OPTIMIZERS.items()
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_five_steps_on_several_ranks_give_the_weights_of_one(world_size, one_rank):
    runs = run_all(world_size, [Case(PLAIN, OPTIMIZERS[name], smooth=dtype) for name, dtype in one_rank])
    for (name, dtype), ranks in zip(one_rank, runs, strict=True):
        for got in ranks:
            if dtype == torch.float64:
                assert_same(got, one_rank[name, dtype], 1e-10, parts=("model",))
            else:  # biases start at zero: of them rounding is a larger share
                assert_same(got, one_rank[name, dtype], 1e-6, floor=1.0)


def test_loss_scaling_changes_no_weight():
    want = run_case(0, 1, Case(PLAIN, ["optim.clip_norm=0.1"], smooth=torch.float64))
    got = run_case(0, 1, Case(PLAIN, ["optim.clip_norm=0.1", "train.precision=fp16"], smooth=torch.float64))
    assert_same(got, want, 1e-12)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-12)
    assert got["statistics"] == {"loss_scale": INITIAL_SCALE, "skipped_steps": 0}


def test_a_step_whose_gradients_overflow_on_one_rank_is_skipped_on_all():
    scaled = Case(PLAIN, ["train.precision=fp16"], smooth=torch.float64, overflow_at=4)
    for got, want in zip(*run_all(2, [scaled, Case(PLAIN, smooth=torch.float64, stop=4)]), strict=True):
        assert_same({**got, "losses": got["losses"][:4]}, want, 1e-12)
        assert got["statistics"] == {"loss_scale": INITIAL_SCALE / 2, "skipped_steps": 1}
        assert got["saved"][1]["step"] == 5  # its batch is not seen again
        assert got["saved"][1]["loss_scale"] == {"scale": INITIAL_SCALE / 2, "good": 0, "in_a_row": 1, "skipped": 1}


def test_too_many_overflows_in_a_row_stop_the_run():
    state, options, batches = build(0, 1, [*PLAIN, "train.precision=fp16"])
    next(state.model.parameters()).register_hook(lambda g: g * float("inf"))
    state.engine.scaler.load_state({"scale": 2.0, "good": 3, "in_a_row": MOST_SKIPS - 1, "skipped": 40})
    train_step(state, batches[0], options)
    with pytest.raises(NonFinite, match="gradients became NaN or Inf"):
        train_step(state, batches[1], options)


def test_the_scale_doubles_after_enough_finite_steps_and_is_restored_from_a_checkpoint():
    scale = LossScale()
    for _ in range(GROWTH_STEPS - 1):
        scale.after_finite_step()
    other = LossScale()
    other.load_state(scale.state())
    other.after_finite_step()
    assert other.scale == 2 * INITIAL_SCALE
    assert other.after_overflow()
    assert other.scale == INITIAL_SCALE
    assert scale.scale == INITIAL_SCALE


@pytest.mark.parametrize("more", [[], ["train.micro_batch_size=10"]])
def test_activation_checkpointing_changes_no_bit(more):
    want = run_case(0, 1, Case(more))
    got = run_case(0, 1, Case(more, ["train.activation_checkpointing=true"]))
    for part in ("model", "optimizer"):
        assert got[part].keys() == want[part].keys()
        assert all(torch.equal(got[part][name], value) for name, value in want[part].items())


def test_activation_checkpointing_with_statistics_over_ranks_changes_no_bit():
    for got, want in zip(*run_all(2, [Case(["train.activation_checkpointing=true"]), Case([])]), strict=True):
        assert all(torch.equal(got["model"][name], value) for name, value in want["model"].items())


class DoubleConv(nn.Module):
    """Convolutions and BatchNorm in float64, whose rounding is too small to grow into a difference."""

    feature_dim = 128

    def __init__(self):
        super().__init__()
        self.conv = build_encoder("conv", image_size=8).double()

    def forward(self, x):
        return self.conv(x.double())


def test_channels_last_gives_the_weights_of_the_default_layout():
    weights = {}
    for layout in (True, False):
        torch.manual_seed(0)
        state, options, batches = build(0, 1, [f"train.channels_last={str(layout).lower()}"], encoder=DoubleConv())
        for batch in batches:
            train_step(state, batch, options)
        kernels = [p for p in state.model.parameters() if p.ndim == 4 and p.shape[1] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) is layout for p in kernels)
        weights[layout] = state.model.encoder.state_dict()
    for name, want in weights[False].items():
        torch.testing.assert_close(weights[True][name], want, rtol=1e-9, atol=1e-12)


def test_a_compiled_pass_gives_the_weights_of_an_uncompiled_one():
    state, options, batches = build(0, 1, ["train.compile=true", "model.momentum_encoder=0.9", "loss.queue_size=30"])
    plain, plain_options, _ = build(0, 1, ["model.momentum_encoder=0.9", "loss.queue_size=30"])
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.callback_handler.register_start_callback(lambda *_: graphs.append(1))
    for batch in batches:
        got, want = train_step(state, batch, options), train_step(plain, batch, plain_options)
        assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-5)
    assert graphs
    names = plain.model.state_dict()
    assert state.model.state_dict().keys() == names.keys()
    for name, value in names.items():
        torch.testing.assert_close(state.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    before = len(graphs)
    with torch.no_grad():  # evaluation runs the plain model, at any batch size
        for n in (1, 3, 7):
            state.model.eval()(torch.zeros(n, 1, 3, 8, 8))
    assert len(graphs) == before
