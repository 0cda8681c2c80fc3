"""Combinations that do not work are refused, by name, before anything is trained."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hpc_supcon.config import differences, load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError, MissingExtra
from hpc_supcon.training.engine import check_engine, checks, unscaled
from hpc_supcon.training.engine.deepspeed_settings import deepspeed_settings

CPU = Runtime(Launch(), torch.device("cpu"))
CUDA = Runtime(Launch(world_size=2), torch.device("cuda", 0))
DEEPSPEED = "train.engine=deepspeed"


@pytest.fixture(autouse=True)
def _everything_installed(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: importlib.util.find_spec("json"))
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("runtime", "overrides", "message"),
    [
        (CPU, ["train.precision=fp16"], r"train\.precision=fp16 needs a CUDA device; use bf16 or fp32"),
        (CPU, ["train.cuda_graphs=true", "train.compile=true"], r"train\.cuda_graphs=true needs a CUDA device"),
        (CUDA, ["train.cuda_graphs=true"], r"set train\.compile=true as well"),
        (CUDA, ["train.cuda_graphs=true", "train.compile=true", DEEPSPEED], r"use train\.engine=ddp"),
        (
            CUDA,
            ["train.cuda_graphs=true", "train.compile=true", "data.batch_size=256", "train.micro_batch_size=50"],
            r"one shape, but 128 images per rank in pieces of train\.micro_batch_size=50 .* divisor of 128",
        ),
        (CPU, ["train.compile=true", "train.activation_checkpointing=true"], "use one of them"),
        (CPU, [DEEPSPEED, "train.deepspeed.zero=2", "train.micro_batch_size=8"], r"use zero 0 or 1"),
        (CPU, [DEEPSPEED, "train.deepspeed.zero=1", "optim.name=lars"], r"optim\.name=lars .* use zero 0"),
        (CPU, [DEEPSPEED, "train.deepspeed.zero=2", "optim.name=lamb"], r"optim\.name=lamb .* use zero 0"),
        (CPU, ["train.deepspeed.config={steps_per_print: 5}"], r"train\.engine=ddp heeds none of it"),
        (
            CPU,
            [DEEPSPEED, "train.deepspeed.config={train_batch_size: 5}"],
            r"train_batch_size is set by data\.batch_size",
        ),
        (CPU, [DEEPSPEED, "train.deepspeed.config={fp16: {enabled: true}}"], r"fp16 is set by train\.precision=fp16"),
        (
            CPU,
            [DEEPSPEED, "train.deepspeed.config.zero_optimization={stage: 2}"],
            r"zero_optimization\.stage is set by train\.deepspeed\.zero",
        ),
        (
            CPU,
            [DEEPSPEED, "train.deepspeed.config={zero_optimization: {offload_optimizer: {device: cpu}}}"],
            r"zero_optimization\.offload_optimizer is not supported",
        ),
    ],
)
def test_refused(runtime, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_engine(load_config("default", overrides), runtime)


@pytest.mark.parametrize(
    ("runtime", "overrides"),
    [
        (CPU, []),
        (CPU, ["train.compile=true"]),
        (CUDA, ["train.precision=fp16", DEEPSPEED, "train.deepspeed.zero=2"]),
        (CUDA, ["train.cuda_graphs=true", "train.compile=true", "data.batch_size=256", "train.micro_batch_size=32"]),
        (CPU, [DEEPSPEED, "train.micro_batch_size=8", "train.deepspeed.zero=1"]),
        (CPU, [DEEPSPEED, "optim.name=lars", "train.deepspeed.zero=0"]),
        (CPU, [DEEPSPEED, "train.deepspeed.config={zero_optimization: {overlap_comm: true}}"]),
    ],
)
def test_taken(runtime, overrides):
    check_engine(load_config("default", overrides), runtime)


def test_without_deepspeed_the_install_line_is_given(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'hpc-supcon\[deepspeed\]'"):
        check_engine(load_config("default", [DEEPSPEED]), CPU)


@pytest.mark.parametrize(("runtime", "name"), [(CPU, r"g\+\+ or clang\+\+"), (CUDA, "gcc or clang")])
def test_without_a_compiler_nothing_is_compiled(monkeypatch, runtime, name):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=f"{name} is not on PATH"):
        check_engine(load_config("default", ["train.compile=true"]), runtime)


def test_the_users_section_is_merged_into_ours():
    own = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 10}, "wall_clock_breakdown": True}
    settings = deepspeed_settings(own, zero=2, images_per_rank=16, parameters=101, scaled=False)
    assert settings["zero_optimization"] == {
        "stage": 2,
        "compute_grad_norm": False,
        "overlap_comm": True,
        "reduce_bucket_size": 10,
    }
    assert settings["wall_clock_breakdown"] is True
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["gradient_clipping"] == 0


def test_a_run_may_go_on_under_another_engine():
    changed = [DEEPSPEED, "train.deepspeed.zero=2", "train.activation_checkpointing=true", "train.compile=true"]
    assert not differences(load_config("default", []), load_config("default", changed))
    assert differences(load_config("default", []), load_config("default", ["train.precision=fp16"]))


def test_fp16_is_not_taken_where_nothing_scales_the_loss():
    assert [unscaled(p) for p in ("fp16", "bf16", "fp32", "auto")] == ["auto", "bf16", "fp32", "auto"]
