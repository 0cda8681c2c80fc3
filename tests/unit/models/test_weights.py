"""Weight files of other projects: their names and containers, what is refused, and that no code is executed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from hpc_supcon import cli
from hpc_supcon.errors import ConfigError, UnsafeWeights
from hpc_supcon.models import build_encoder, load_weights


def randomized(module):
    """Change BatchNorm's statistics and all parameters at random, so that swapped tensors give another output."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = 0.02 * torch.randn_like(value)
                value.mul_(0.9).add_(noise.abs() if "running_var" in name else noise)
    return module.eval()


def add_prefix(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def headless(network, attribute):
    setattr(network, attribute, nn.Identity())
    return network


@pytest.fixture(scope="module")
def resnet18():
    """(torchvision's network with its classifier, its features of some images, the images)"""
    torch.manual_seed(1)
    network = randomized(torchvision.models.resnet18())
    x = torch.randn(2, 3, 48, 48)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        return state, headless(network, "fc")(x), x


def supcontrast(state):  # networks/resnet_big.py: the shortcut's name, DataParallel around the encoder, a projection
    names = {k.replace("downsample.", "shortcut."): v for k, v in state.items() if not k.startswith("fc.")}
    head = {"head.0.weight": torch.ones(512, 512), "head.2.weight": torch.ones(128, 512)}
    return {"opt": argparse.Namespace(lr=0.05), "epoch": 3, "model": {**add_prefix(names, "encoder.module."), **head}}


def solo_learn(state):
    names = {k: v for k, v in state.items() if not k.startswith("fc.")}
    slow = add_prefix({k: v + 1 for k, v in names.items()}, "momentum_backbone.")
    rest = {"projector.0.weight": torch.ones(4, 512), "classifier.weight": torch.ones(10, 512)}
    return {"state_dict": {**slow, **add_prefix(names, "backbone."), **rest}, "epoch": 1}


def moco(state):
    names = {k: v for k, v in state.items() if not k.startswith("fc.")} | {"fc.0.weight": torch.ones(512, 512)}
    slow = add_prefix({k: v + 1 for k, v in names.items()}, "module.encoder_k.")
    queue = {"module.queue": torch.ones(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"arch": "resnet18", "state_dict": {**slow, **add_prefix(names, "module.encoder_q."), **queue}}


FORMATS = {
    "torchvision": lambda s: s,
    "timm": lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet18", "args": argparse.Namespace(lr=1)},
    "dataparallel": lambda s: {"model_state_dict": add_prefix(s, "module.")},
    "compiled": lambda s: {"model": add_prefix(s, "_orig_mod.module.")},
    "nested": lambda s: {"state_dict": {"model": add_prefix(s, "model.backbone.")}},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "supcontrast": supcontrast,
    "solo-learn": solo_learn,
    "moco": moco,
}


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".pt") for name in FORMATS), ("moco", ".pth.tar"), ("timm", ".ckpt")]
)
def test_a_resnet18_of_every_project_gives_the_same_features(tmp_path, resnet18, name, suffix):
    state, want, x = resnet18
    content = FORMATS[name](state)
    torch.save(content, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=suffix != ".pth.tar")
    encoder = build_encoder("resnet18", image_size=48, stem="standard")
    result = load_weights(encoder, tmp_path / f"w{suffix}")
    with torch.no_grad():
        got = encoder.eval()(x)
    close = {"rtol": 2e-2, "atol": 2e-2} if name == "half" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)
    assert result.missing == []
    assert len(result.loaded) == len(encoder.state_dict()) == 120
    assert result.sha256 == hashlib.sha256((tmp_path / f"w{suffix}").read_bytes()).hexdigest()
    if name == "supcontrast":
        assert result.unexpected == ["head.0.weight", "head.2.weight"]
    elif name == "solo-learn":
        assert result.unexpected == ["projector.0.weight", "classifier.weight"]
        assert len(result.ignored) == 120
    elif name == "moco":
        assert result.unexpected == ["module.encoder_q.fc.0.weight"]
        assert {"module.queue", "module.queue_ptr", "module.encoder_k.conv1.weight"} <= set(result.ignored)
    else:
        assert [k.rpartition("fc.")[2] for k in result.unexpected] == ["weight", "bias"]


def test_safetensors_of_timm_with_another_classifier(tmp_path, resnet18):
    theirs = randomized(timm.create_model("resnet18", num_classes=7))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    encoder = build_encoder("resnet18", image_size=48, stem="standard", out_dim=5)
    own = encoder.fc.weight.detach().clone()
    result = load_weights(encoder, str(tmp_path / "model.safetensors"))
    x = resnet18[2]
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval().forward_features(x), theirs.forward_features(x))
    assert torch.equal(encoder.fc.weight, own)
    assert (result.missing, result.unexpected) == (["fc.weight", "fc.bias"], ["fc.bias", "fc.weight"])
    whole = build_encoder("resnet18", image_size=48, stem="standard", out_dim=7)
    assert load_weights(whole, tmp_path / "model.safetensors").missing == []
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(x), theirs(x))


@pytest.mark.parametrize("published", [False, True])
def test_a_densenet_of_torchvision_with_both_of_its_namings(tmp_path, published):
    theirs = randomized(torchvision.models.densenet121())
    state = theirs.state_dict()
    if published:  # the files of its model zoo say norm.1 where the module says norm1
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "w.pth")
    encoder = build_encoder("densenet121", image_size=64, stem="standard")
    assert load_weights(encoder, tmp_path / "w.pth").unexpected == ["classifier.weight", "classifier.bias"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), headless(theirs, "classifier")(x), rtol=1e-4, atol=1e-4)


def torchvision_vgg(plan, side, width):
    """torchvision's VGG with narrow linear layers: its own have 100 million parameters."""
    vgg = torchvision.models.vgg
    with torch.device("meta"):
        network = vgg.VGG(nn.Identity(), init_weights=False)
    network.features = vgg.make_layers(plan, batch_norm=True)
    channels = [c for c in plan if c != "M"][-1]
    for i, (c_in, c_out) in {0: (channels * 49, width), 3: (width, width), 6: (width, 10)}.items():
        network.classifier[i] = nn.Linear(c_in, c_out)
    return randomized(network), torch.randn(2, 3, side, side)


def test_a_vgg_of_torchvision_loads_into_vgg16_bn_embed(tmp_path):
    theirs, x = torchvision_vgg(torchvision.models.vgg.cfgs["D"], 32, 16)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    embed = build_encoder("vgg16_bn_embed").eval()
    result = load_weights(embed, tmp_path / "w.pth")
    assert result.missing == ["latent.weight", "latent.bias"]
    assert result.unexpected == [f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]
    with torch.no_grad():
        maps = theirs.features(x)
        torch.testing.assert_close(embed.features(x), maps)
        want = maps.mean((2, 3)).repeat_interleave(49, dim=1) @ embed.latent.weight.T + embed.latent.bias
        torch.testing.assert_close(embed(x), want, rtol=1e-4, atol=1e-4)


def test_linear_layers_of_torchvisions_vgg_load_into_timms_convolutions(tmp_path):
    plan = [8, "M", 16, "M"]
    theirs, x = torchvision_vgg(plan, 28, 4096)  # timm's width is fixed
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = timm.models.VGG(plan, num_classes=0, norm_layer=nn.BatchNorm2d).eval()
    assert load_weights(ours, tmp_path / "w.pth").unexpected == ["classifier.6.weight", "classifier.6.bias"]
    theirs.classifier[6] = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_old_files_without_batch_counters_load(tmp_path, resnet18):
    state = {k: v for k, v in resnet18[0].items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "w.pth")
    result = load_weights(build_encoder("resnet18", stem="standard"), tmp_path / "w.pth")
    assert len(result.missing) == 20
    assert all(name.endswith("num_batches_tracked") for name in result.missing)


@pytest.mark.parametrize("name", ["conv", "resnet9_small"])
def test_a_checkpoint_of_this_package_loads_by_its_encoder_prefix(tmp_path, name):
    source, target = randomized(build_encoder(name)), build_encoder(name)
    rest = {"heads.projection.out.weight": torch.ones(2, 2)}
    safetensors.torch.save_file(
        {**add_prefix(source.state_dict(), "encoder."), **rest}, tmp_path / "model.safetensors"
    )
    assert load_weights(target, tmp_path / "model.safetensors").unexpected == list(rest)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(target.eval()(x), source(x))


def refused(encoder, content, path, *parts, error=ConfigError):
    torch.save(content, path)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(error) as caught:
        load_weights(encoder, path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_the_error_for_the_other_stem_names_the_setting_to_change(tmp_path, resnet18):
    refused(
        build_encoder("resnet18"), resnet18[0], tmp_path / "w.pt",
        "conv1.weight is [64, 3, 7, 7], not [64, 3, 3, 3]", "model.stem=standard",
    )  # fmt: skip
    small = {**resnet18[0], "conv1.weight": torch.ones(64, 3, 3, 3)}
    refused(build_encoder("resnet18", stem="standard"), small, tmp_path / "w.pt", "model.stem=small")


def test_the_error_for_other_channels_names_the_setting_to_change(tmp_path, resnet18):
    encoder = build_encoder("resnet18", stem="standard", in_channels=1)
    refused(encoder, resnet18[0], tmp_path / "w.pt", "[64, 3, 7, 7], not [64, 1, 7, 7]", "data.channels=3")
    encoder = build_encoder("resnet18", stem="standard", in_channels=5)
    refused(encoder, resnet18[0], tmp_path / "w.pt", "the file is for images of 3 channels, not 5: use null")


@pytest.mark.parametrize(
    ("other", "ours", "part"),
    [
        ("resnet34", "resnet18", "96 of the file's tensors do not exist in the encoder: layer1.2.conv1.weight [64,"),
        ("resnet18", "resnet34", "80 tensors are missing: layer1.2.conv1.weight, "),
        ("resnet50", "resnet18", "weights of another architecture"),
        ("vit_tiny_patch16_224", "resnet18", "the file has cls_token [1, 1, 192]"),
        ("densenet121", "resnet18", "the encoder has conv1.weight [64, 3, 7, 7]"),
        ("resnext50_32x4d", "resnet50", "differ: layer1.0.conv1.weight is [128, 64, 1, 1], not [64, 64, 1, 1]"),
    ],
)
def test_another_architecture_is_refused(tmp_path, other, ours, part):
    state = {k: torch.zeros(v.shape) for k, v in timm.create_model(other).state_dict().items()}
    refused(build_encoder(ours, image_size=224), state, tmp_path / "w.pt", part)


def test_all_missing_tensors_are_listed(tmp_path, resnet18):
    gone = ["layer2.0.bn1.running_mean", "layer3.1.conv2.weight", "layer4.0.downsample.0.weight"]
    state = {k: v for k, v in resnet18[0].items() if k not in gone}
    refused(
        build_encoder("resnet18", stem="standard"),
        state,
        tmp_path / "w.pt",
        f"3 tensors are missing: {', '.join(gone)}",
    )


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("where", ["alone", "beside"])
def test_a_file_that_needs_code_execution_is_refused_and_executes_nothing(tmp_path, resnet18, writer, where):
    trap, path = tmp_path / "made", tmp_path / "w.pth"
    content = Payload(trap) if where == "alone" else {"state_dict": resnet18[0], "extra": Payload(trap)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(UnsafeWeights, match=r"refused: .*executes code") as caught:
        load_weights(build_encoder("resnet18", stem="standard"), path)
    assert writer == "pickle" or "posix.mkdir" in str(caught.value)
    assert not trap.exists()
    # the payload works when it is unpickled
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()


def test_a_pickled_module_is_refused_with_its_class_named(tmp_path):
    refused(
        build_encoder("resnet9_small"), nn.Linear(2, 2), tmp_path / "w.pt", "torch.nn.modules.linear.Linear",
        error=UnsafeWeights,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "folder", "gone"])
def test_damaged_files_are_refused(tmp_path, suffix, damage):
    encoder, path = build_encoder("resnet9_small"), tmp_path / f"w{suffix}"
    if damage == "cut":
        save = torch.save if suffix == ".pt" else safetensors.torch.save_file
        save(encoder.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(b"" if damage == "empty" else b"no weights" * 50)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        load_weights(encoder, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2), {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_an_error(tmp_path, content):
    refused(build_encoder("resnet9_small"), content, tmp_path / "w.pt", "no state dict", "model_state_dict")


FAST = [
    "data.source=synthetic", "data.synthetic={images: 64, classes: 4, channels: 1, image_size: 8}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=1", "optim.lr=1e-9", "log.tensorboard=false", "runtime.threads=1",
]  # fmt: skip


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments])
    return stopped.value.code or 0


def test_a_run_starts_from_the_weights_logs_them_and_resumes_without_the_file(tmp_path, capsys):
    source = randomized(build_encoder("conv", in_channels=1, image_size=8))
    path, run_dir = tmp_path / "w.safetensors", tmp_path / "r"
    safetensors.torch.save_file({**source.state_dict(), "fc.weight": torch.ones(2)}, path)
    arguments = [
        "pretrain",
        "default",
        *FAST,
        f"model.weights={path}",
        "checkpoint.every_steps=2",
        f"run_dir={run_dir}",
    ]
    assert command(*arguments) == 0
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["event"] == "weights"]
    assert event["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (event["missing"], event["unexpected"], len(event["loaded"])) == (
        [],
        ["fc.weight"],
        len(source.state_dict()),
    )
    assert f"weights: {len(source.state_dict())} tensors from {path}" in capsys.readouterr().err
    saved = safetensors.torch.load_file(sorted(run_dir.glob("checkpoints/step-*"))[-1] / "model.safetensors")
    for name, p in source.named_parameters():  # the learning rate is too small to change them
        torch.testing.assert_close(saved[f"encoder.{name}"], p.detach(), rtol=0, atol=1e-6)
    path.unlink()
    assert command(*arguments, "--resume") == 0
    assert command(*arguments, f"run_dir={tmp_path}/other") == 2


def test_weights_of_another_architecture_exit_with_2_before_the_run_folder_is_made(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    assert command("pretrain", "default", *FAST, f"model.weights={tmp_path}/w.pt", f"run_dir={tmp_path}/r") == 2
    assert "another architecture" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
