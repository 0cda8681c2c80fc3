"""Pruning without a run: masks against torch.nn.utils.prune, ties, weights kept at zero, sparse files, sizes."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as reference

from hpc_supcon import checkpoint
from hpc_supcon.errors import CheckpointCorrupt, ConfigError, NonFinite
from hpc_supcon.models import build_encoder
from hpc_supcon.pruning import (
    GradualPruning,
    PruneTask,
    WeightMasks,
    build_masks,
    fully_pruned,
    load_sparse,
    masks_digest,
    measure,
    pack,
    prunable,
    save_sparse,
    score_weights,
    unpack,
    write_sparse,
)
from hpc_supcon.training.step import train_step
from tests.dist.test_step import build

RATES = [0, 0.001, 0.2, 1 / 3, 0.5, 0.77, 0.99]


def net():
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 5, (1, 3), groups=1), nn.Flatten(), nn.Linear(11, 3)
    )


def masks_of(model, rate, scope="global"):
    return build_masks(score_weights("l1", PruneTask(prunable(model))).scores, rate, scope)


def torch_masks(model, rate, scope):
    """The masks that torch.nn.utils.prune gives for a copy of the model."""
    model = copy.deepcopy(model)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if scope == "global":
        targets = [(m, "weight") for m in modules.values()]
        reference.global_unstructured(targets, pruning_method=reference.L1Unstructured, amount=float(rate))
    else:
        for module in modules.values():
            reference.l1_unstructured(module, "weight", amount=float(rate))
    return {f"{name}.weight": m.weight_mask.bool() for name, m in modules.items()}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rate", RATES)
def test_masks_equal_those_of_torch(scope, rate):
    for model in (net(), build_encoder("resnet9_small", image_size=16)):
        got, want = masks_of(model, rate, scope), torch_masks(model, rate, scope)
        assert got.keys() == want.keys()
        for name, mask in got.items():
            assert torch.equal(mask, want[name]), name


@pytest.mark.parametrize("scope", ["global", "layer"])
@given(rate=st.floats(0, 0.99), sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5), data=st.data())
@settings(max_examples=60)
def test_the_number_of_pruned_weights_is_exact_also_with_ties(scope, rate, sizes, data):
    scores = {str(i): torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))).float()
              for i, n in enumerate(sizes)}  # fmt: skip
    try:
        masks = build_masks(scores, rate, scope)
    except ConfigError:
        assert all(round(rate * n) == n for n in ([sum(sizes)] if scope == "global" else sizes))
        return
    assert masks.keys() == scores.keys()
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in groups:
        flat = np.concatenate([scores[name].numpy() for name in names])
        kept = np.concatenate([masks[name].numpy() for name in names])
        n = round(rate * len(flat))
        assert (~kept).sum() == n
        # by definition: the first n of a stable sort by score
        want = np.ones(len(flat), dtype=bool)
        want[np.argsort(flat, kind="stable")[:n]] = False
        assert (kept == want).all()


def test_only_weights_of_convolutions_and_linear_layers_are_pruned_each_once():
    model = net()
    model.append(model[4])  # shared
    assert list(prunable(model)) == ["0.weight", "2.weight", "4.weight"]
    encoder = build_encoder("resnet18", image_size=32)
    names = prunable(encoder)
    assert set(names) == {name for name, p in encoder.named_parameters() if p.ndim > 1}
    assert list(prunable(nn.Linear(2, 2))) == ["weight"]


def test_what_cannot_be_pruned_is_an_error():
    scores = score_weights("l1", PruneTask(prunable(net()))).scores
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        build_masks(scores, 0.5, "layers")
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"prune\.rate"):
            build_masks(scores, rate, "global")
    with pytest.raises(ConfigError, match="nothing to prune"):
        build_masks({}, 0.5, "global")
    with pytest.raises(ConfigError, match="leaves no weight"):
        build_masks(scores, 0.999999, "layer")
    scores["2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"2\.weight"):
        build_masks(scores, 0.5, "global")


def test_fully_pruned_layers_are_found():
    model = net()
    model[2].weight.data.mul_(1e-6)
    masks = masks_of(model, 0.5)
    assert fully_pruned(masks) == ["2.weight"]
    assert fully_pruned(masks_of(model, 0.5, "layer")) == []


def test_different_masks_have_different_digests():
    masks = masks_of(net(), 0.5)
    other = {name: mask.clone() for name, mask in masks.items()}
    assert masks_digest(masks) == masks_digest(other)
    other["0.weight"].view(-1)[3] ^= True
    assert masks_digest(masks) != masks_digest(other)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 2), (0,), (2, 0, 3)])
def test_unpacking_a_packed_mask_gives_the_mask(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, shape), mask)
    for i, bit in enumerate(mask.flatten().tolist()):
        assert (int(packed[i // 8]) >> i % 8) & 1 == bit
    with pytest.raises(ValueError, match="packed mask"):
        unpack(packed, (mask.numel() + 9,))


RUNS = [
    ["optim.momentum=0.9", "optim.weight_decay=0.05"],
    ["optim.nesterov=true", "optim.weight_decay=0.05", "train.ema=0.9", "optim.clip_norm=0.5"],
    ["optim.name=lars", "optim.weight_decay=0.05", "optim.lars_eta=0.02", "train.micro_batch_size=12"],
    ["optim.name=lamb", "optim.lr=0.01", "optim.weight_decay=0.05", "train.channels_last=false"],
    ["optim.name=adamw", "optim.lr=0.001", "optim.weight_decay=0.05", "loss.queue_size=32",
     "model.momentum_encoder=0.9"],
]  # fmt: skip


def pruned_state(overrides, rate=0.6):
    state, options, batches = build(0, 1, overrides)
    masks = masks_of(state.model.encoder, rate)
    state.masks = WeightMasks(state.model.encoder, masks)
    if state.ema is not None:  # as in a run, where weights are masked before the state is built
        state.ema.load_state_dict(state.model.state_dict())
    return state, options, batches, masks


def assert_pruned(tensors, masks, prefix="encoder."):
    for name, mask in masks.items():
        weight = tensors[prefix + name]
        assert not weight[~mask].view(torch.int32).any(), f"{name}: a pruned weight is not +0"
        assert weight[mask].count_nonzero() == mask.sum(), f"{name}: a kept weight is gone"


@pytest.mark.parametrize("overrides", RUNS)
def test_pruned_weights_stay_zero_through_100_steps_and_a_resume(tmp_path, overrides):
    state, options, batches, masks = pruned_state(overrides)
    before = copy.deepcopy(state.model.state_dict())
    for step in range(100):
        if step == 50:
            path = checkpoint.save_checkpoint(
                tmp_path, 50, state.tensors(), state.numbers(), world_size=1, config_digest="", trusted=set()
            )
            found = checkpoint.load_checkpoint(path)
            state, _, _ = build(0, 1, overrides)  # without masks
            state.load(found.tensors, found.state)
        train_step(state, batches[step % len(batches)], options)
    assert_pruned(state.model.state_dict(), masks)
    if state.ema is not None:
        assert_pruned(state.ema.state_dict(), masks)
    for name in masks:
        assert not torch.equal(state.model.state_dict()[f"encoder.{name}"], before[f"encoder.{name}"])
        parameter = dict(state.model.encoder.named_parameters())[name]
        slots = {key: t for key, t in state.engine.tensors().items() if key.startswith(f"encoder.{name}/")}
        assert slots
        for slot in slots.values():
            if slot.shape == parameter.shape:
                assert not slot[~masks[name]].any(), "momentum of a pruned weight"
    path = checkpoint.save_checkpoint(tmp_path, 100, state.tensors(), state.numbers(), world_size=1, config_digest="")
    assert_pruned(checkpoint.load_checkpoint(path).tensors["model"], masks)


def gradual_steps(overrides, steps, folder=None):
    """The state after `steps` steps with a ramp to 0.8 until step 24; with a folder, saved and loaded at 14."""
    state, options, batches = build(0, 1, overrides)
    state.gradual = GradualPruning("lamp", "global", 0.0, 0.8, interval=4, updates=6, seed=3)
    for step in range(steps):
        if folder is not None and step == 14:
            path = checkpoint.save_checkpoint(
                folder, 14, state.tensors(), state.numbers(), world_size=1, config_digest=""
            )
            found = checkpoint.load_checkpoint(path)
            state, _, _ = build(0, 1, overrides)  # knows of no pruning
            state.load(found.tensors, found.state)
        train_step(state, batches[step % len(batches)], options)
    return state


@pytest.mark.parametrize("overrides", RUNS)
def test_gradual_pruning_is_exact_and_resumes_bit_for_bit(tmp_path, overrides):
    whole, resumed = gradual_steps(overrides, 36), gradual_steps(overrides, 36, tmp_path)
    for part, tensors in whole.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(resumed.tensors()[part][name], tensor), (part, name)
    encoder, packed = whole.model.encoder, whole.masks.packed()
    masks = {name: unpack(packed[name], tuple(w.shape)) for name, w in prunable(encoder).items()}
    total = sum(mask.numel() for mask in masks.values())
    assert total - sum(int(mask.sum()) for mask in masks.values()) == round(0.8 * total)
    assert_pruned(whole.model.state_dict(), masks)
    copies = [whole.ema.state_dict()] if whole.ema else []
    copies += [whole.queue.key_model.state_dict()] if whole.queue and whole.queue.key_model else []
    for copied in copies:
        assert_pruned(copied, masks)
    for key, slot in whole.engine.tensors().items():
        name = key.rpartition("/")[0].removeprefix("encoder.")
        if name in masks and slot.shape == masks[name].shape:
            assert not slot[~masks[name]].any(), f"{key}: momentum of a pruned weight"


def test_steps_of_a_masked_model_equal_those_of_torchs_reparametrization():
    """torch.nn.utils.prune's weight_orig * weight_mask, trained beside it, has the same kept weights."""
    state, options, batches, masks = pruned_state(["optim.weight_decay=0.01"])
    other, _, _ = build(0, 1, ["optim.weight_decay=0.01"])
    with torch.no_grad():
        for name, mask in masks.items():
            dict(other.model.encoder.named_parameters())[name].mul_(mask)
    others = {name: m for name, m in other.model.encoder.named_modules() if f"{name}.weight" in masks}
    for name, module in others.items():
        reference.custom_from_mask(module, "weight", masks[f"{name}.weight"])
    for batch in batches:
        train_step(state, batch, options)
        train_step(other, batch, options)
    for name, module in others.items():
        mine = dict(state.model.encoder.named_parameters())[f"{name}.weight"]
        torch.testing.assert_close(mine, module.weight_orig * module.weight_mask, rtol=1e-5, atol=1e-7)


def test_masks_of_another_model_are_an_error():
    masks = masks_of(net(), 0.5)
    with pytest.raises(KeyError):
        WeightMasks(nn.Linear(2, 2), masks)
    masks["4.weight"] = masks["4.weight"][:, :5]
    with pytest.raises(ValueError, match=r"4\.weight"):
        WeightMasks(net(), masks)


def state_dict():
    rng = torch.Generator().manual_seed(1)
    dense = torch.randn(40, 60, generator=rng)
    half = torch.where(torch.rand(40, 60, generator=rng) < 0.5, dense, 0)
    rare = torch.where(torch.rand(40, 60, generator=rng) < 0.01, dense, 0)
    shared = torch.randn(300, generator=rng)
    odd = half.clone()
    odd[0, :4] = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-45])
    return {
        "dense": dense, "half": half, "rare": rare, "odd": odd, "none": torch.zeros(40, 60),
        "bf16": half.bfloat16(), "half precision": rare.half(), "double": half.double(),
        "transposed": half.t(), "channels/last": half.view(4, 10, 6, 10).to(memory_format=torch.channels_last),
        "count": torch.tensor(7), "zero": torch.tensor(0), "empty": torch.zeros(0, 3), "bool": half != 0,
        "shared 1": shared, "shared 2": shared, "part": shared[10:20], "long": (half * 9).long(),
        "complex": torch.complex(half, dense),
    }  # fmt: skip


def test_a_sparse_file_returns_every_bit(tmp_path):
    state = state_dict()
    save_sparse(state, tmp_path / "s.safetensors")
    loaded = load_sparse(tmp_path / "s.safetensors")
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert (
            loaded[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()
            if tensor.dtype != (torch.bfloat16)
            else torch.equal(loaded[name], tensor)
        ), name
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        encodings = {name: encoding for name, (encoding, _) in json.loads(file.metadata()["tensors"]).items()}
    wanted = {"dense": "dense", "half": "bitmap", "rare": "indices", "none": "indices", "count": "dense"}
    assert {name: encodings[name] for name in wanted} == wanted


@given(n=st.integers(0, 400), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_any_density_is_restored_and_the_file_is_never_much_larger(tmp_path_factory, n, share, seed):
    rng = torch.Generator().manual_seed(seed)
    tensor = torch.where(torch.rand(n, generator=rng) < share, torch.randn(n, generator=rng), 0)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    written = save_sparse({"w": tensor}, path)
    assert written == path.stat().st_size
    assert torch.equal(load_sparse(path)["w"], tensor)
    assert written <= 4 * n + 400


def test_a_damaged_or_foreign_sparse_file_is_an_error(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointCorrupt, match=r"s\.safetensors"):
        load_sparse(path)
    save_sparse(state_dict(), path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointCorrupt, match="bytes changed"):
            load_sparse(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        load_sparse(path)
    path.write_bytes(whole.replace(b"bitmap", b"titmap"))
    with pytest.raises(CheckpointCorrupt):
        load_sparse(path)
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(CheckpointCorrupt, match="not a file of sparse weights"):
        load_sparse(path)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_half_of_the_weights_take_about_half_of_the_bytes(tmp_path, scope):
    encoder = build_encoder("resnet9_small", image_size=16)
    WeightMasks(encoder, masks_of(encoder, 0.5, scope))
    size, content = measure(encoder.state_dict())
    write_sparse(tmp_path / "m.safetensors", content)
    dense = safetensors.torch.save(encoder.state_dict())
    assert size["dense_bytes"] == len(dense)
    assert gzip.decompress(gzip.compress(dense, 6, mtime=0)) == dense
    assert size["gzip_bytes"] == len(gzip.compress(dense, 6, mtime=0)) < size["dense_bytes"]
    assert size["sparse_bytes"] == (tmp_path / "m.safetensors").stat().st_size < 0.54 * size["dense_bytes"]
    assert size["ratio_sparse"] == pytest.approx(size["dense_bytes"] / size["sparse_bytes"], abs=1e-4)
    loaded = load_sparse(tmp_path / "m.safetensors")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
