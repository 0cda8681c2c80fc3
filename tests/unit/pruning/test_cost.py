"""Costs of pruned models: multiply-accumulates against other counters, timing in turn, sizes with fewer bits."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import zstandard
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpc_supcon.errors import CheckpointCorrupt
from hpc_supcon.models import build_encoder
from hpc_supcon.pruning import VALUES, cost, count_macs, load_sparse, measure, measure_latency, save_sparse


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [("resnet18", {"stem": "standard"}, 1.814e9), ("resnet50", {"stem": "standard"}, 4.089e9)],
)
def test_macs_are_the_published_ones(name, options, published):
    model = build_encoder(name, image_size=224, out_dim=1000, **options)
    assert count_macs(model, torch.zeros(1, 3, 224, 224))["macs"] == pytest.approx(published, rel=2e-3)


def pytorchs_macs(model, images):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["conv", "resnet9_small", "resnet18", "mobilenetv3_small_050"])
def test_macs_are_those_that_pytorch_counts(name):
    model = build_encoder(name, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    model.train()
    counts = count_macs(model, images)
    assert model.training
    assert counts["macs"] == counts["nonzero_macs"] == pytorchs_macs(model, images)


def test_weights_that_are_zero_do_not_count():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        model[0].weight[0, 1] = 0  # 9 weights at 2 x 2 positions
        model[2].weight[:, 0] = 0  # 5 weights at one
    assert count_macs(model, images) == {"macs": 3 * 2 * 9 * 4 + 60, "nonzero_macs": 3 * 2 * 9 * 4 + 60 - 9 * 4 - 5}


class Counted(nn.Module):
    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.calls.append((self.name, len(x)))
        return x


def test_models_are_timed_in_turn():
    calls = []
    models = {name: Counted(name, calls) for name in "ab"}
    found = measure_latency(models, (1, 2, 2), batch_sizes=(1, 3), seconds=1e-9 + 0.002)
    for batch in (1, 3):
        timed = [name for name, n in calls if n == batch][4:]  # two of each are not counted
        assert timed == ["a", "b"] * (len(timed) // 2)
        assert found["a"][batch]["calls"] == found["b"][batch]["calls"] == len(timed) // 2 >= cost.MIN_CALLS
        assert 0 <= found["a"][batch]["low_ms"] <= found["a"][batch]["median_ms"] <= found["a"][batch]["high_ms"]


def test_a_batch_that_takes_too_long_or_does_not_fit_is_left_out(monkeypatch):
    calls = []
    taken = {1: 0.5, 4: 2.0}
    monkeypatch.setattr(cost, "_seconds_of", lambda call, device: (call(), taken[calls[-1][1]])[1])
    found = measure_latency({"a": Counted("a", calls)}, (1, 2, 2), batch_sizes=(1, 4), seconds=1.0)
    assert found == {"a": {1: {"median_ms": 500, "low_ms": 500, "high_ms": 500, "calls": cost.MIN_CALLS}, 4: None}}

    class Full(Counted):
        def forward(self, x):
            if len(x) > 1:
                raise torch.OutOfMemoryError
            return super().forward(x)

    assert measure_latency({"a": Full("a", calls)}, (1, 2, 2), batch_sizes=(1, 4), seconds=1.0)["a"][4] is None


def state():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 17, generator=generator)
    weight[torch.rand(31, 17, generator=generator) < 0.7] = 0
    return {
        "weight": weight,
        "half": torch.randn(5, 3, generator=generator).half(),
        "large": torch.full((2, 2), 1e30),
        "none": torch.zeros(4, 4),
        "empty": torch.zeros(0, 3),
        "broken": torch.tensor([[float("nan"), 1.0]]),
        "bias": torch.randn(31, generator=generator),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("values", VALUES)
def test_values_in_fewer_bits(tmp_path, values):
    before = state()
    save_sparse(before, tmp_path / "f", values=values)
    after = load_sparse(tmp_path / "f")
    step = float(before["weight"].abs().max()) / 127
    largest = {"same": 0, "fp16": 2**-11 * 4, "int8": step / 2 * (1 + 1e-6)}[values]
    assert list(after) == list(before)
    assert all(t.dtype == before[name].dtype and t.shape == before[name].shape for name, t in after.items())
    assert float((after["weight"] - before["weight"]).abs().max()) <= largest
    assert torch.equal(after["weight"] == 0, (before["weight"] == 0) | (after["weight"] == 0))
    for name in ("none", "empty", "bias", "steps"):
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(after["broken"], before["broken"]) is torch.equal(before["broken"], before["broken"])
    if values != "int8":
        assert torch.equal(after["half"], before["half"])
        assert torch.equal(after["large"], before["large"])  # fp16 cannot hold it
    else:
        torch.testing.assert_close(after["large"], before["large"])
        assert float((after["weight"] - before["weight"]).abs().max()) > 0


def test_sizes_and_errors_are_those_of_the_files(tmp_path):
    weights = {"w": state()["weight"], "b": state()["bias"]}
    whole = {"w": torch.randn(62, 17), "b": torch.randn(62)}
    facts, payload = measure(weights, "int8", original=whole)
    for values, name in (("same", "sparse"), ("fp16", "sparse_fp16"), ("int8", "sparse_int8")):
        path = tmp_path / values
        assert facts[f"{name}_bytes"] == save_sparse(weights, path, values=values) == path.stat().st_size
        if values != "same":
            lost = (load_sparse(path)["w"].double() - weights["w"].double()).norm() / weights["w"].double().norm()
            assert facts[f"error_{values}"] == pytest.approx(float(lost), rel=1e-2)
            assert 0 < lost < (1e-3 if values == "fp16" else 2e-2)
    (tmp_path / "payload").write_bytes(payload)  # the order of metadata in the bytes is not fixed
    again = load_sparse(tmp_path / "payload")
    assert all(torch.equal(t, again[name]) for name, t in load_sparse(tmp_path / "int8").items())
    dense = safetensors.torch.save(weights)
    assert facts["dense_bytes"] == len(dense)
    assert facts["original_bytes"] == len(safetensors.torch.save(whole))
    assert facts["zstd_bytes"] == len(zstandard.ZstdCompressor(level=3).compress(dense))
    assert facts["ratio_zstd"] == round(facts["original_bytes"] / facts["zstd_bytes"], 4)
    assert facts["nonzero_share"] == round(int((weights["w"] != 0).sum()) / weights["w"].numel(), 6)
    json.dumps(facts)


def test_a_scale_that_is_no_number_is_damage(tmp_path):
    save_sparse({"w": torch.randn(9, 9)}, tmp_path / "f", values="int8")
    tensors = safetensors.torch.load_file(tmp_path / "f")
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        metadata = file.metadata()
    index = json.loads(metadata["tensors"])
    for wrong in (["float99", 1.0], ["float32", "x"], ["float32"] * 3):
        metadata["tensors"] = json.dumps({"w": [*index["w"][:2], *wrong]})
        safetensors.torch.save_file(tensors, tmp_path / "g", metadata=metadata)
        with pytest.raises(CheckpointCorrupt, match="its parts do not fit together"):
            load_sparse(tmp_path / "g")
