"""Training on a GPU: the step, the check for NaN and Inf, saving, resuming, compilation, CUDA graphs, fp16, NCCL."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
import torch
import torch.distributed as dist

from hpc_supcon import checkpoint, run_folder
from hpc_supcon.config import load_config
from hpc_supcon.data import Batch
from hpc_supcon.distributed import collectives
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import NonFinite
from hpc_supcon.losses import SupConLoss
from hpc_supcon.training.checkpointer import Checkpointer
from hpc_supcon.training.step import train_step
from tests.devices import DEVICES, needs_cuda
from tests.dist.test_step import SETTINGS, build
from tests.fault.test_finite_check import poison

SAME_VIEWS = ["augment.policy=none"]
"""Views do not depend on the device's random numbers."""


def started(device, *overrides):
    """(state, options of the step, batches) on `device`."""
    runtime = Runtime(Launch(), torch.device(device, 0) if device == "cuda" else torch.device(device))
    state, options, batches = build(0, 1, list(overrides), runtime=runtime)
    state.parallel.train()
    return state, options, [Batch(b.images.to(device), b.labels.to(device), b.index.to(device)) for b in batches]


def losses(device, *overrides, steps=5):
    state, options, batches = started(device, *overrides)
    return [float(train_step(state, batch, options).loss) for batch in islice(cycle(batches), steps)]


@needs_cuda
def test_on_cuda_the_steps_are_those_of_the_cpu():
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = losses("cuda", *SAME_VIEWS)
    assert found == pytest.approx(losses("cpu", *SAME_VIEWS), rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(device):
    state, options, batches = started(device)
    poison(state, 3)
    with pytest.raises(NonFinite, match="step 3: outputs of rank 0 became NaN or Inf"):  # noqa: PT012
        for batch in batches:
            train_step(state, batch, options)
    assert state.step == (3 if device == "cuda" else 2), "on CUDA it is noticed one step later"
    if device == "cuda":
        with pytest.raises(NonFinite, match="step 3"):
            state.tensors()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_saved_beside_training_is_the_state_before_the_next_step(device, tmp_path):
    state, options, batches = started(device, "train.ema=0.9")
    config = load_config("default", [*SETTINGS, f"run_dir={tmp_path / 'r'}"])
    run_folder.create(tmp_path / "r", config)
    with Checkpointer(config, {}, Runtime(Launch(), state.device)) as checkpointer:
        train_step(state, batches[0], options)
        before = copies(state)
        checkpointer.save(state)
        train_step(state, batches[1], options)
        checkpointer.snapshot(state)()
        after = copies(state)
    for step, want in ((1, before), (2, after)):
        found = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoints" / f"step-{step}").tensors
        for stem, tensors in want.items():
            for name, tensor in tensors.items():
                assert torch.equal(found[stem][name], tensor), (step, stem, name)


def copies(state):
    return {
        stem: {name: t.detach().cpu().clone() for name, t in tensors.items()}
        for stem, tensors in state.tensors().items()
    }


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(device):
    state, options, batches = started(device, "train.ema=0.9")
    for batch in batches[:2]:
        train_step(state, batch, options)
    saved, numbers = copies(state), state.numbers()
    for batch in batches[2:]:
        train_step(state, batch, options)
    other, options, batches = started(device, "train.ema=0.9", "seed=0")
    other.load(saved, numbers)
    for batch in batches[2:]:
        train_step(other, batch, options)
    want, got = copies(state), copies(other)
    for stem, tensors in want.items():
        for name, tensor in tensors.items():
            assert torch.equal(got[stem][name], tensor), (stem, name)


@needs_cuda
@pytest.mark.parametrize("more", [[], ["train.cuda_graphs=true"]])
def test_on_cuda_compiled_and_captured_steps_are_those_of_eager_mode(more):
    torch.compiler.reset()
    found = losses("cuda", *SAME_VIEWS, "train.compile=true", *more, steps=8)
    assert found == pytest.approx(losses("cuda", *SAME_VIEWS, steps=8), rel=1e-2)


@needs_cuda
def test_on_cuda_fp16_trains_and_a_step_that_overflows_is_skipped():
    state, options, batches = started("cuda", *SAME_VIEWS, "train.precision=fp16")
    found = [float(train_step(state, batch, options).loss) for batch in batches]
    assert found == pytest.approx(losses("cuda", *SAME_VIEWS), rel=5e-2)
    before = copies(state)["model"]
    state.engine.scaler.scale = 2.0**100
    train_step(state, batches[0], options)
    assert state.engine.scaler.scale == 2.0**99
    weights = {name for name, _ in state.model.named_parameters()}
    assert all(torch.equal(t, before[name]) for name, t in copies(state)["model"].items() if name in weights)


@pytest.mark.parametrize("device", DEVICES)
def test_a_process_group_of_one_rank_changes_no_loss(device, tmp_path):
    """NCCL on CUDA, gloo on a CPU."""
    x, labels = torch.randn(40, 8, device=device), torch.arange(40, device=device) % 7
    want = SupConLoss(0.1)(x, labels)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(SupConLoss(0.1)(x, labels), want)
        torch.testing.assert_close(collectives.all_sum(x), x)
        torch.testing.assert_close(collectives.gather_rows(x, [40]), x)
        assert collectives.gather_objects({"rank": 0}) == [{"rank": 0}]
    finally:
        dist.destroy_process_group()
