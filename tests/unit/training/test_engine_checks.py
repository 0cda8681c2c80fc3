"""What a machine has no device, compiler or package for is refused before anything is trained."""

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
    ("overrides", "message"),
    [
        (["train.precision=fp16"], r"train\.precision=fp16 needs a CUDA device; use bf16 or fp32"),
        (["train.cuda_graphs=true", "train.compile=true"], r"train\.cuda_graphs=true needs a CUDA device"),
    ],
)
def test_what_needs_a_cuda_device_is_refused_on_a_cpu(overrides, message):
    config = load_config("default", overrides, stages=("pretrain",))
    with pytest.raises(ConfigError, match=message):
        check_engine(config, CPU)
    check_engine(config, CUDA)


@pytest.mark.parametrize("runtime", [CPU, CUDA])
@pytest.mark.parametrize("overrides", [[], ["train.compile=true"], [DEEPSPEED, "train.deepspeed.zero=2"]])
def test_taken_on_every_device(runtime, overrides):
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
