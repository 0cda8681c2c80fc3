"""The training step: two passes equal one, on one and on several ranks; queue and momentum encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpc_supcon.bench.common import resident
from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, Batch, LoaderOptions, Splits, fingerprint
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import NonFinite
from hpc_supcon.models import PretrainingModel, Projection
from hpc_supcon.training.build import Start, build_training
from hpc_supcon.training.data import Data
from hpc_supcon.training.ema import MomentumQueue
from hpc_supcon.training.step import train_step
from tests import brute_force
from tests.dist.ranks import run_ranks

SETTINGS = [
    "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8", "data.batch_size=24",
    "train.precision=fp32", "optim.lr=0.1", "loss.temperature=0.2",
]  # fmt: skip


class DoubleEncoder(nn.Module):
    """A float64 encoder with dropout and without BatchNorm, so that pieces cannot differ by their statistics."""

    feature_dim = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 64, 24), nn.Tanh(), nn.Dropout(0.0), nn.Linear(24, 12), nn.Tanh()
        )
        self.double()

    def forward(self, x):
        return self.layers(x.to(self.layers[1].weight.dtype))


def in_memory(splits):
    """These splits, kept in memory and served without random crops."""
    return Data(splits, "resident", "", LoaderOptions(), LoaderOptions(), fingerprint(splits))


def build(rank, world_size, overrides, *, encoder=None, runtime=None, start=None):
    """(state, options of the step, this rank's batches): 5 global batches with another class mix on every rank.

    encoder: trained in place of that of SETTINGS; start(config): what training starts from.
    """
    config = load_config("default", [*SETTINGS, *overrides], stages=("pretrain",))
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (120, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(120) // 7) % 4
    labels[5] = 4  # an image without partner
    source = ArraySource(images, labels, tuple("abcde"))
    data = in_memory(Splits(source, source, source))
    runtime = runtime or Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    start = None if start is None else start(config)
    if encoder is not None:
        torch.manual_seed(config.seed)
        heads = {"projection": Projection(encoder.feature_dim, 16, 8).to(next(encoder.parameters()).dtype)}
        start = Start(PretrainingModel(encoder, heads))
    training = build_training(config, data, runtime, start=start)
    size = 24 // world_size
    rows = [torch.arange(step * 24 + rank * size, step * 24 + (rank + 1) * size) for step in range(5)]
    return training.state, training.options, [Batch(images[r], labels[r], r) for r in rows]


def five_steps(rank, world_size, overrides):
    torch.manual_seed(0)
    state, options, batches = build(rank, world_size, overrides, encoder=DoubleEncoder())
    losses = [float(train_step(state, batch, options).loss) for batch in batches]
    return losses, {k: v.clone() for k, v in state.model.state_dict().items()}, dict(state.objective.state_dict())


def assert_equal_runs(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-10)
    for name, value in want[1].items():
        assert (got[1][name] - value).norm() <= 1e-10 * value.norm(), name
    for name, value in want[2].items():
        torch.testing.assert_close(got[2][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["supcon_out", "supcon_in", "tcl", "simclr", "triplet", "cross_entropy"])
@pytest.mark.parametrize("piece", [1, 5, 24])
def test_five_steps_in_two_passes_equal_five_in_one(loss, piece):
    overrides = [f"loss.name={loss}", "loss.mining=hard", "loss.k1=10"]
    if loss in ("triplet", "cross_entropy"):
        want, got = (five_plain_steps([*overrides, *more]) for more in ([], [f"train.micro_batch_size={piece}"]))
        assert got == pytest.approx(want, rel=1e-4)
        return
    want = five_steps(0, 1, overrides)
    assert_equal_runs(five_steps(0, 1, [*overrides, f"train.micro_batch_size={piece}"]), want)


def five_plain_steps(overrides):
    torch.manual_seed(0)
    state, options, batches = build(0, 1, overrides)
    for norm in (m for m in state.model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    return [float(train_step(state, batch, options).loss) for batch in batches]


@pytest.mark.parametrize("more", [[], ["train.micro_batch_size=5"]])
def test_a_step_takes_images_that_a_loader_has_cropped(more):
    overrides = ["augment.crop_scale=[1, 1]", "augment.crop_ratio=[1, 1]", *more]  # cropping changes nothing
    losses = []
    for cropped in (False, True):
        torch.manual_seed(0)
        state, options, batches = build(0, 1, overrides, encoder=DoubleEncoder())
        if cropped:
            batches = [Batch(b.images[:, None].expand(-1, 2, -1, -1, -1), b.labels, b.index) for b in batches]
        losses.append([float(train_step(state, batch, options).loss) for batch in batches])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_passes_over_ranks_equal_one_pass_over_ranks(world_size):
    overrides = ["loss.learnable_temperature=true"]
    want = run_ranks(five_steps, world_size, overrides)
    got = run_ranks(five_steps, world_size, [*overrides, "train.micro_batch_size=5"])
    for one, two in zip(want, got, strict=True):
        assert_equal_runs(two, one)
        assert_equal_runs(two, want[0])  # and every rank holds the same weights


def exchanges(rank, world_size, overrides):
    state, options, batches = build(rank, world_size, overrides, encoder=DoubleEncoder())
    buckets = []

    def hook(_, bucket):
        buckets.append(bucket.buffer().numel())
        return (
            torch.distributed.all_reduce(bucket.buffer().div_(world_size), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    state.parallel.register_comm_hook(None, hook)
    train_step(state, batches[0], options)
    return sum(buckets), sum(p.numel() for p in state.model.parameters())


def test_two_passes_send_each_gradient_once():
    for sent, parameters in run_ranks(exchanges, 2, ["train.micro_batch_size=4"]):
        assert sent == parameters


def test_dropout_is_the_same_in_both_passes():
    torch.manual_seed(0)
    encoder = DoubleEncoder()
    encoder.layers[3] = nn.Dropout(0.5)
    state, options, batches = build(0, 1, ["train.micro_batch_size=7"], encoder=encoder)
    seen = []
    encoder.layers[3].register_forward_hook(lambda m, i, o: seen.append((o == 0) & (i[0] != 0)))
    train_step(state, batches[0], options)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_running_statistics_are_updated_once_per_step_in_two_passes():
    state, options, batches = build(0, 1, ["train.micro_batch_size=12"])
    train_step(state, batches[0], options)
    counts = {int(m.num_batches_tracked) for m in state.model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {2}  # two pieces, second pass only


def big_step(rank, world_size, images, piece):
    """Peak memory (MiB) that one step adds, in a separate process."""
    sizes = [f"data.batch_size={images}", f"train.micro_batch_size={piece}"]
    config = load_config("default", ["model.encoder=resnet9_small", "train.precision=fp32", *sizes])
    pixels = torch.zeros(images, 3, 32, 32, dtype=torch.uint8)
    source = ArraySource(pixels, torch.arange(images) % 10, tuple("abcdefghij"))
    runtime = Runtime(Launch(), torch.device("cpu"))
    training = build_training(config, in_memory(Splits(source, source, source)), runtime)
    before = resident("VmHWM")  # unlike ru_maxrss not inherited from the process that started this one
    train_step(training.state, Batch(pixels, source.labels, source.labels), training.options)
    return (resident("VmHWM") - before) / 2**20


def test_peak_memory_of_two_passes_does_not_grow_with_the_batch():
    small, large, one_pass = (run_ranks(big_step, 1, *sizes)[0] for sizes in ((128, 32), (512, 32), (512, 512)))
    assert large < small + 30
    assert one_pass > 3 * large


def push(rank, world_size, size):
    queue = MomentumQueue(PretrainingModel(nn.Identity(), {"p": nn.Linear(2, 2)}), size, 2, None)
    seen = []
    for step in range(4):
        labels = torch.tensor([10 * step + 3 * rank + k for k in range(3 if rank == 0 else 2)])
        queue.push(torch.stack([labels, -labels], 1).float()[:, None], labels)
        features, held = queue.columns()
        assert torch.equal(features, torch.stack([held, -held], 1).float())
        seen.append(sorted(held.tolist()))
    return seen


@pytest.mark.parametrize("size", [3, 5, 7, 100])
def test_the_queue_holds_the_newest_keys_of_all_ranks(size):
    everything = [10 * step + k for step in range(4) for k in range(5)]
    want = [sorted(everything[: 5 * (step + 1)][-size:]) for step in range(4)]
    for seen in run_ranks(push, 2, size):
        assert seen == want


def test_the_momentum_encoder_is_the_moving_average_and_gets_no_gradient():
    overrides = ["model.momentum_encoder=0.9", "loss.queue_size=40"]
    state, options, batches = build(0, 1, overrides)
    before = copy.deepcopy(state.queue.key_model)
    train_step(state, batches[0], options)
    for old, new, online in zip(
        before.parameters(), state.queue.key_model.parameters(), state.model.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)
        assert new.grad is None
    assert int(state.queue.pushed) == 24
    train_step(state, batches[1], options)
    features, labels = state.queue.columns()
    assert features.shape == (40, 8)
    assert set(labels[:8].tolist()) == set(batches[1].labels[-8:].tolist())


def queue_steps(rank, world_size):
    overrides = ["model.momentum_encoder=0.9", "loss.queue_size=30", "loss.name=tcl", "loss.k1=10"]
    state, options, batches = build(rank, world_size, overrides)
    losses = [float(train_step(state, batch, options).loss) for batch in batches]
    return losses, {k: v.clone() for k, v in state.queue.state_dict().items()}


def test_ranks_hold_the_same_queue_and_see_the_same_loss():
    first, second = run_ranks(queue_steps, 2)
    assert first[0] == second[0]
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=1e-6, atol=1e-6)


def test_a_queue_state_survives_a_checkpoint():
    overrides = ["model.momentum_encoder=0.9", "loss.queue_size=30", "loss.learnable_temperature=true"]
    state, options, batches = build(0, 1, overrides)
    for batch in batches[:2]:
        train_step(state, batch, options)
    saved = {part: {k: t.clone() for k, t in named.items()} for part, named in state.tensors().items()}
    assert set(saved) == {"model", "optimizer", "objective", "queue"}
    want = [float(train_step(state, batch, options).loss) for batch in batches[2:]]
    other, other_options, _ = build(0, 1, overrides)
    other.load(saved, {"step": 2})
    assert [float(train_step(other, batch, other_options).loss) for batch in batches[2:]] == want


KEYS = ["loss.keys=momentum", "loss.queue_size=30", "model.momentum_encoder=0.9", "augment.policy=none"]


@pytest.mark.parametrize("more", [[], ["loss.supervised=false"], ["train.micro_batch_size=24"]])
def test_a_batch_is_compared_with_the_keys_that_the_momentum_encoder_makes_of_it(more):
    torch.manual_seed(0)
    state, options, batches = build(0, 1, [*KEYS, *more], encoder=DoubleEncoder())
    supervised = "loss.supervised=false" not in more
    for batch in batches[:3]:
        past = state.queue.columns()
        if past is not None:
            past = past[0].clone(), past[1].clone() if supervised else torch.full_like(past[1], 99)
        encoder, seen = copy.deepcopy(state.queue.key_model), []
        hook = state.queue.key_model.register_forward_hook(
            lambda m, i, o, seen=seen: seen.append((*i, o["projection"]))
        )
        result = train_step(state, batch, options)
        hook.remove()
        [(views, keys)] = seen
        assert views.shape[:2] == (24, 2)
        assert torch.equal(keys, encoder(views)["projection"]), "before it follows this step"
        embeddings = result.outputs["projection"]
        labels = batch.labels if supervised else None
        expected = brute_force.contrastive(embeddings, labels, 0.2, queue=past, keys=keys)
        assert float(result.loss) == pytest.approx(float(expected), rel=1e-6)
        held = state.queue.columns()[0]
        newest = (int(state.queue.pushed) - 24 + torch.arange(24)) % 30
        assert torch.equal(held[newest], keys[:, 0].float())
    assert not torch.allclose(keys, embeddings)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_with_keys_ranks_and_two_passes_give_the_steps_of_one_process_in_one(world_size):
    overrides = [*KEYS, "loss.name=tcl", "loss.k1=10", "loss.learnable_temperature=true"]
    want = five_steps(0, 1, overrides)
    for more in ([], ["train.micro_batch_size=5"]):
        for got in run_ranks(five_steps, world_size, [*overrides, *more]):
            assert_equal_runs(got, want)


def poisoned(rank, world_size):
    state, options, batches = build(rank, world_size, [])
    train_step(state, batches[0], options)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    if rank == 1:
        state.model.heads["projection"].hidden.register_forward_hook(lambda m, i, o: o * float("nan"))
    with pytest.raises(NonFinite) as caught:
        train_step(state, batches[1], options)
    parameters = dict(state.model.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in parameters.items()), "stopped before the update"
    return str(caught.value)


def test_nan_on_one_rank_stops_all_ranks_before_the_update_and_names_it():
    for message in run_ranks(poisoned, 2):
        assert "step 2" in message
        assert "rank 1" in message
