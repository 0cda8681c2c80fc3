"""The phases of a step: every moment belongs to one of them, and measuring changes no result."""

from __future__ import annotations

import gc
import gzip
import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_supcon import phases
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import NonFinite
from hpc_supcon.phases import Clock, measured_by, phase
from hpc_supcon.seeding import stream
from hpc_supcon.training import state as state_module
from hpc_supcon.training.fit import collect_garbage_every
from hpc_supcon.training.profile import TRACED, WARM_UP, Breakdown, StepProfile, breakdown
from hpc_supcon.training.step import train_step
from tests.dist.ranks import run_ranks
from tests.dist.test_step import build
from tests.processes import Ranks

CPU = torch.device("cpu")


class Time:
    """A clock that advances only by `passes`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(phases.time, "perf_counter", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds


class Delay(torch.autograd.Function):
    """The identity; it lets the given numbers of seconds pass in forward and backward."""

    @staticmethod
    def forward(ctx, x, time, forward, backward):
        time.passes(forward)
        ctx.time, ctx.backward_s = time, backward
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.time.passes(ctx.backward_s)
        return grad, None, None, None


def delay(module, time, forward, backward):
    """Let these seconds pass after `module`, in forward and backward."""
    module.register_forward_hook(lambda m, i, o: Delay.apply(o, time, forward, backward))


def timed_state(time, overrides):
    state, options, batches = build(0, 1, overrides)
    delay(state.model.encoder, time, 3.0, 7.0)
    delay(state.model.heads["projection"], time, 2.0, 5.0)
    delay(state.objective, time, 11.0, 13.0)
    draw, render, step = state.views.draw, state.views.render, state.engine.step
    state.views.draw = lambda *size: (time.passes(0.5), draw(*size))[1]
    state.views.render = lambda *some: (time.passes(1.0), render(*some))[1]
    state.engine.step = lambda *some: (time.passes(17.0), step(*some))[1]
    return state, options, batches


def measured(state, options, batches):
    clock = Clock(CPU)
    with measured_by(clock, state.model):
        for batch in batches:
            train_step(state, batch, options)
    return breakdown(clock, len(batches))


def test_the_time_of_every_part_of_a_step_is_counted_for_its_phase(monkeypatch):
    time = Time(monkeypatch)
    found = measured(*timed_state(time, []))
    assert found.seconds == {
        "views": 1.5, "encoder": 3.0, "projection": 2.0, "loss": 11.0, "loss backward": 13.0,
        "projection backward": 5.0, "encoder backward": 7.0, "optimizer": 17.0, "finite check": 0.0, "rest": 0.0,
    }  # fmt: skip
    assert found.total == time.now / 5
    assert found.share("encoder") == 10 / 59.5
    assert found.names() == ["views", "encoder", "projection", "loss", "optimizer", "finite check", "rest"]


def test_the_time_of_both_passes_of_a_step_is_counted_for_the_same_phases(monkeypatch):
    found = measured(*timed_state(Time(monkeypatch), ["train.micro_batch_size=8"]))  # three pieces, each twice
    assert found.seconds == {
        "views": 6.5, "encoder": 18.0, "projection": 12.0, "loss": 11.0, "loss backward": 13.0,
        "projection backward": 15.0, "encoder backward": 21.0, "optimizer": 17.0, "finite check": 0.0, "rest": 0.0,
    }  # fmt: skip


@phase("gather")
def ended_by_an_error(time):
    time.passes(16)
    raise NonFinite("the phase ends as well")


def test_nested_phases_add_up_to_the_total(monkeypatch):
    time = Time(monkeypatch)
    clock = Clock(CPU)
    with measured_by(clock, nn.ModuleDict({"encoder": nn.Identity()})):
        time.passes(1)
        with phase("loss"):
            time.passes(2)
            with phase("gather"):
                time.passes(4)
            time.passes(8)
            with pytest.raises(NonFinite):
                ended_by_an_error(time)
        time.passes(32)
    assert clock.read() == {"rest": 33, "loss": 10, "gather": 20}


def test_numbers_and_table_of_a_breakdown():
    found = Breakdown({"rest": 0.001, "encoder": 0.004, "encoder backward": 0.005, "own": 0.002}, 3)
    numbers = found.numbers()
    assert numbers["step_ms"] == pytest.approx(12)
    assert sum(v for k, v in numbers.items() if k != "step_ms") == pytest.approx(12)
    assert found.names() == ["encoder", "rest", "own"]
    assert found.share("encoder") == pytest.approx(0.75)


@pytest.mark.parametrize(
    "overrides", [[], ["train.micro_batch_size=7"], ["loss.terms={supcon_out: 1, cross_entropy: 0.5}"]]
)
def test_measuring_and_tracing_change_no_bit(overrides, tmp_path):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        state, options, batches = build(0, 1, overrides)
        reports = []
        profile = StepProfile(3, state.model, CPU, tmp_path, reports.append) if watched else nullcontext()
        with profile as active:
            for k in range(WARM_UP + 3 + TRACED + 2):
                train_step(state, batches[k % 5], options)
                if active is not None:
                    active.step()
        ends.append(state.model.state_dict())
    assert [r.steps for r in reports] == [3]
    assert {"encoder backward", "projection backward", "views", "loss"} <= set(reports[0].seconds)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    counts = [
        sum(e.get("name") == f"step/{name}" and e.get("cat") == "user_annotation" for e in events)
        for name in ("views", "loss", "optimizer")
    ]
    assert counts[1:] == [TRACED, TRACED]
    assert counts[0] >= 2 * TRACED


def test_a_run_that_ends_early_reports_what_it_measured(tmp_path):
    state, options, batches = build(0, 1, [])
    reports = []
    with StepProfile(100, state.model, CPU, tmp_path / "none", reports.append) as profile:
        for k in range(WARM_UP + 2):
            train_step(state, batches[k % 5], options)
            profile.step()
    assert [r.steps for r in reports] == [2]
    assert not phases._clocks
    assert not (tmp_path / "none").exists()


def trace_of_no_steps():
    """Writes a trace to the folder that the command line names."""
    state, *_ = build(0, 1, [])
    with StepProfile(1, state.model, CPU, Path(sys.argv[1]), lambda found: None) as profile:
        for _ in range(WARM_UP + 1 + TRACED):
            state.model(torch.rand(2, 1, 3, 8, 8))
            profile.step()


def test_the_profilers_library_writes_nothing_to_the_terminal(tmp_path):
    run = Ranks([str(tmp_path)], tmp_path / "stderr", main=trace_of_no_steps)
    assert run.end() == [0], run.stderr
    assert (tmp_path / "trace.json.gz").exists()
    assert run.stderr == ""


def test_a_trace_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    state, options, batches = build(0, 1, [])
    with StepProfile(1, state.model, CPU, tmp_path / "file", lambda found: None) as profile:
        for k in range(WARM_UP + TRACED + 2):
            train_step(state, batches[k % 5], options)
            profile.step()
    told = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path}/file/trace.json.gz: not written: ")


class Cycle:
    def __init__(self):
        self.cycle = self


def test_garbage_is_collected_at_the_given_steps_only():
    with collect_garbage_every(3) as collect:
        assert not gc.isenabled()
        gone = []
        for step in range(1, 8):
            cycle = Cycle()
            watch = weakref.ref(cycle)
            del cycle
            collect(step)
            gone.append(watch() is None)
        assert gone == [step % 3 == 0 for step in range(1, 8)]
    assert gc.isenabled()


def test_the_collector_is_enabled_again_after_an_error_and_unchanged_without_a_number_of_steps():
    with pytest.raises(NonFinite), collect_garbage_every(3):
        raise NonFinite("x")
    assert gc.isenabled()
    with collect_garbage_every(None) as collect:
        assert gc.isenabled()
        collect(3)
    gc.disable()
    try:
        with collect_garbage_every(3):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- waiting for the device

WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def refuse(monkeypatch, names):
    def wait(*_):
        raise AssertionError("the host waits for the device")

    for name in names:
        monkeypatch.setattr(torch.Tensor, name, wait)


class FakeTiledBackend:
    """A backend without arithmetic, for a device without data; the real ones are CUDA kernels there."""

    def __init__(self, tile_size, *, exact):
        pass

    def row_sums(self, gathered, temperature):
        from hpc_supcon.losses.autograd import RowSums

        n = gathered.u.new_empty(5, gathered.own.stop - gathered.own.start)
        return RowSums(n[0], n[1], n[2], *([None, None] if temperature is None else [n[3], n[4]]))

    def row_gradients(self, gathered, weights_M4, temperature):
        return torch.empty_like(gathered.u[gathered.own])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.name=lars", "optim.clip_norm=1.0", "train.ema=0.99", "augment.blur=0.5"],
        ["optim.name=lamb", "train.micro_batch_size=5", "augment.policy=autoaugment"],
        ["loss.name=tcl", "loss.queue_size=30", "model.momentum_encoder=0.9", "augment.policy=randaugment"],
        ["loss.name=tcl", "loss.learnable_temperature=true", "augment.policy=none"],
        ["loss.name=triplet", "loss.mining=semihard", "augment.policy=flip_crop"],
        ["loss.terms={supcon_in: 1, cross_entropy: 0.5}", "augment.policy=none"],
    ],
    ids=lambda overrides: overrides[0] if overrides else "default",
)
def test_a_step_never_waits_for_its_device_except_to_read_the_finite_check(monkeypatch, overrides, backend):
    """On a device whose tensors have no values: reading a value fails, and so does every copy to the host."""
    from hpc_supcon.losses import torch_tiled

    monkeypatch.setattr(torch_tiled, "TorchTiledBackend", FakeTiledBackend)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # it does not know such a device
    meta = torch.device("meta")
    state, options, batches = build(0, 1, [*overrides, f"loss.backend={backend}"], runtime=Runtime(Launch(), meta))
    options = replace(options, defer_finite_check=True)
    monkeypatch.setattr(state_module, "_to_host", lambda numbers: (torch.zeros(3), None))
    for batch in batches[:3]:
        train_step(state, type(batch)(batch.images.to(meta), batch.labels.to(meta), batch.index.to(meta)), options)
    assert state.step == 3
    with pytest.raises(RuntimeError):
        bool(torch.ones((), device=meta))  # the assumption of this test


def ranks_that_may_not_wait(rank, world_size, overrides):
    state, options, batches = build(rank, world_size, overrides)
    drawn = []  # drawing happens on the CPU for every device
    for step, batch in enumerate(batches):
        state.views.reseed(stream(options.seed, "views", rank, step))
        drawn.append(state.views(batch.images))
    state.views.draw, state.views.select = (lambda *a: None), (lambda *a: None)
    state.views.render = lambda *a: drawn[state.step]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpc_supcon.training.step.FiniteCheck", lambda *a: None)
        # the queue's position is a number on the CPU
        refuse(patch, [name for name in WAITS if state.queue is None or name != "__int__"])
        results = [train_step(state, batch, options) for batch in batches]
    return [float(r.loss) for r in results]


def ranks_that_exchange_sizes(rank, world_size, overrides):
    state, options, batches = build(rank, world_size, overrides)
    options = replace(options, images_per_rank=None)
    return [float(train_step(state, batch, options).loss) for batch in batches]


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.backend=reference"],
        ["loss.name=simclr", "loss.backend=reference", "loss.queue_size=30"],
        ["loss.name=triplet", "loss.mining=hard", "optim.lr=0.0001"],
    ],
)
def test_ranks_that_know_their_batch_sizes_need_not_exchange_them(overrides):
    assert run_ranks(ranks_that_may_not_wait, 2, overrides) == run_ranks(ranks_that_exchange_sizes, 2, overrides)
