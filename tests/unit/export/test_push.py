"""`push`: timm, transformers and this package load the run's features; cards; folders are whole or absent."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from hpc_supcon.data import EvalTransform
from hpc_supcon.errors import ConfigError, OutputError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.export import load_part, load_pushed, push
from hpc_supcon.export.card import NO_LICENSE
from hpc_supcon.models import build_encoder, load_weights
from tests.commands import run
from tests.fault import runs
from tests.unit.export.test_export import images_of, untrained

SYNTHETIC = "data.synthetic={{images: 24, classes: 3, channels: {}, image_size: {}}}".format
BY_TIMM = {
    "vit": ["model.encoder=test_vit", SYNTHETIC(3, 32)],
    "vit, gray, resized": ["model.encoder=test_vit", "model.input_size=48", SYNTHETIC(1, 28)],
    "vit with an output layer": ["model.encoder=test_vit", "model.out_dim=7", SYNTHETIC(3, 32)],
    "resnet with timm's stem": ["model.encoder=resnet18", "model.stem=standard", SYNTHETIC(3, 32)],
    "resnet, gray": ["model.encoder=resnet18", "model.stem=standard", SYNTHETIC(1, 32)],
    "densenet with timm's stem": ["model.encoder=densenet121", "model.stem=standard", SYNTHETIC(3, 32)],
}
BY_US_ALONE = {
    "own": (["model.encoder=resnet9_small", SYNTHETIC(3, 32)], "resnet9_small is an encoder of hpc_supcon"),
    "small stem": (["model.encoder=resnet18", SYNTHETIC(3, 32)], "timm's resnet18 has no small stem"),
    "small stem of a densenet": (["model.encoder=densenet121", SYNTHETIC(3, 32)], "timm's densenet121 has no small"),
    "fewer channels": (
        ["model.encoder=resnet18", "model.stem=standard", SYNTHETIC(3, 32), "model.channels={layer1.0.bn1: [32], "
         "layer1.0.conv1: [32, 64], layer1.0.conv2: [64, 32]}"], "fewer channels than timm's",
    ),
}  # fmt: skip
LOAD = """
import json, sys, timm, torch, transformers, safetensors.torch
transformers.logging.set_verbosity_error()
for folder, images, out in json.loads(sys.argv[1]):
    x = safetensors.torch.load_file(images)["images"].double()
    found, errors = {}, {}
    with torch.no_grad():
        try:
            found["timm"] = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()(x)
        except RuntimeError as error:
            errors["timm"] = str(error)
        try:
            found["transformers"] = transformers.AutoModel.from_pretrained(folder).eval().double()(x).pooler_output
        except ValueError as error:
            errors["transformers"] = str(error)
    safetensors.torch.save_file({key: t.contiguous() for key, t in found.items()}, out, metadata=errors)
"""


def in_float64(module, images):
    """Two processes may choose other kernels of one operation: float32 differs with the depth of the model."""
    return copy.deepcopy(module).double()(images.double())


def slug(name):
    return name.replace(" ", "-").replace(",", "").replace("'", "")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """name -> (run folder, pushed folder, what `push` returned, images, features by timm and transformers, errors).

    They are loaded in one other process, which has imported nothing of this package.
    """
    root, cases, jobs = tmp_path_factory.mktemp("pushed"), {}, []
    every = BY_TIMM | {name: overrides for name, (overrides, _) in BY_US_ALONE.items()}
    for name, overrides in every.items():
        base = root / slug(name)
        folder = untrained(base, *overrides)
        result = push(folder, str(root / f"{slug(name)}-pushed"), page=False)
        part = load_part(folder, "encoder")
        size = part.description["encoder"]["input_size"] or part.shape[1]
        images = torch.randn(2, part.shape[0], size, size)
        safetensors.torch.save_file({"images": images}, root / f"{slug(name)}.images")
        jobs.append(
            [str(root / f"{slug(name)}-pushed"), str(root / f"{slug(name)}.images"), str(root / f"{slug(name)}.out")]
        )
        cases[name] = [folder, root / f"{slug(name)}-pushed", result, part.module, images]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, json.dumps(jobs)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (_, _, out), case in zip(jobs, cases.values(), strict=True):
        with safetensors.safe_open(out, framework="pt") as file:
            case += [{key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}]  # noqa: SIM118
    return cases


@pytest.mark.parametrize("name", BY_TIMM)
@torch.no_grad()
def test_timm_and_transformers_give_the_features_of_the_run(pushed, name):
    _, folder, result, module, images, found, errors = pushed[name]
    assert not errors
    assert result.not_timm is None
    want = in_float64(module, images)
    torch.testing.assert_close(found["timm"], want)
    if "output layer" in name:  # transformers gives the features before it
        exact = copy.deepcopy(module).double()
        want = exact.forward_head(exact.forward_features(images.double()), pre_logits=True)
    torch.testing.assert_close(found["transformers"], want)
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt*"))


@pytest.mark.parametrize("name", BY_US_ALONE)
@torch.no_grad()
def test_other_encoders_are_refused_by_name_and_loaded_by_this_package(pushed, name):
    _, folder, result, module, images, found, errors = pushed[name]
    assert not found
    encoder = json.loads((folder / "config.json").read_text())["hpc_supcon"]["encoder"]
    assert f"Unknown model (hpc_supcon-{encoder['name']})" in errors["timm"]
    assert "model type `hpc_supcon`" in errors["transformers"]
    assert BY_US_ALONE[name][1] in result.not_timm
    assert f"Not in timm or transformers: {result.not_timm}." in (folder / "README.md").read_text()
    own = build_encoder(**encoder).eval()
    load_weights(own, folder)
    assert torch.equal(own(images), module(images))


@pytest.mark.parametrize("name", [*BY_TIMM, *BY_US_ALONE])
def test_load_pushed_gives_encoder_and_projection_of_the_run(pushed, name):
    run_dir, folder, *_ = pushed[name]
    for part in ("encoder", "projection"):
        want, got = load_part(run_dir, part), load_pushed(folder, part)
        images = images_of(3, *want.shape)
        assert torch.equal(got(images), want(images))
        assert {**got.description, "checkpoint": ""} == {**want.description, "checkpoint": ""}


@pytest.mark.parametrize("name", ["small stem", "small stem of a densenet"])
@torch.no_grad()
def test_the_lines_of_the_card_build_the_small_stem_with_timm(pushed, name, monkeypatch):
    _, folder, _, module, images, *_ = pushed[name]
    text = (folder / "README.md").read_text().partition("With timm's layers")[2]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) >= 4
    names = {"timm": timm, "torch": torch, "safetensors": safetensors}
    monkeypatch.chdir(folder)
    exec("\n".join(lines[:4]), names)
    torch.testing.assert_close(in_float64(names["model"], images), in_float64(module, images))


@torch.no_grad()
def test_timms_own_transform_normalizes_as_training_does(pushed):
    run_dir, folder, *_ = pushed["vit"]
    part = load_part(run_dir, "encoder")
    pixels = images_of(1, *part.shape)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    got = transform(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))[None]
    torch.testing.assert_close(got, EvalTransform(**part.description["normalization"])(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(got), part(pixels), rtol=1e-5, atol=1e-5)
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert classifier(got).shape == (1, 5)


FAST = [
    "report.embeddings=false", "data.source=synthetic", SYNTHETIC(3, 32), "data.synthetic.images=60",
    "data.batch_size=16", "model.encoder=test_vit", "model.projection_hidden=16", "model.projection_dim=8",
    "train.iterations=2", "probe.kind=[linear, knn, finetune, softmax]", "probe.linear.epochs=1", "probe.knn.k=3",
    "probe.linear.lrs=[0.01]", "probe.finetune.epochs=1", "probe.finetune.batch_size=16",
    "probe.softmax.iterations=10", "log.tensorboard=false", "runtime.threads=1", "model.lora.rank=2",
    "name='a | *b* <i>'",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a run with adapters and probes, the folder it was pushed to)"""
    root = tmp_path_factory.mktemp("trained")
    runs.run(1, root / "run", *FAST[1:], stage="run", settings=FAST[:1])
    push(root / "run", str(root / "model"), license="cc-by-4.0")
    return root / "run", root / "model"


@torch.no_grad()
def test_adapters_are_merged_and_probes_go_along(trained):
    run_dir, folder = trained
    names = {"README.md", "config.json", "model.safetensors", "projection.safetensors", "report.html"}
    assert {p.name for p in folder.iterdir()} == names | {
        f"probe-{kind}.safetensors" for kind in ("linear", "finetune")
    }
    assert (
        safetensors.torch.load_file(folder / "model.safetensors").keys()
        == timm.create_model("test_vit", num_classes=0).state_dict().keys()
    )
    images = images_of(4, 3, 32, 32)
    for part, probe in (
        ("encoder", None),
        ("projection", None),
        ("classifier", "linear"),
        ("classifier", "finetune"),
    ):
        want, got = load_part(run_dir, part, probe), load_pushed(folder, part, probe)
        assert torch.equal(got(images), want(images)), part
        assert got.classes == want.classes
    assert torch.equal(load_pushed(folder).module.cls_token, load_model(run_dir)[0].encoder.cls_token)
    with pytest.raises(
        ConfigError, match=r"no part 'classifier' with probe='knn' .*probe='linear'.*probe='finetune'"
    ):
        load_pushed(folder, "classifier", "knn")


def test_the_card_reads_back_with_scores_license_and_text_that_stays_text(trained):
    run_dir, folder = trained
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "timm"
    results = json.loads((run_dir / "results.json").read_text())["results"]
    scores = {(r["probe"], m): r["test"][m] for r in results for m in ("accuracy", "f1") if r["checkpoint"]}
    assert {r.metric_name for r in card.data.eval_results} == {f"{probe} probe, {m}" for probe, m in scores}
    for result in card.data.eval_results:
        probe, _, metric = result.metric_name.partition(" probe, ")
        assert result.metric_value == pytest.approx(scores[probe, metric], abs=1e-6)
    assert "# a \\| \\*b\\* \\<i\\>" in card.text
    interval = json.loads((run_dir / "scores.json").read_text())["probes"]["knn"]["splits"]["test"][
        "accuracy_interval"
    ]
    assert f"[{interval[0]:.4f}, {interval[1]:.4f}]" in card.text
    assert "model.lora.rank: 2" in card.text
    assert "[report.html](report.html)" in card.text
    assert str(run_dir.parent) not in (folder / "README.md").read_text()


def test_without_a_license_card_and_terminal_say_so(trained, capsys, tmp_path):
    code, out, err = run(capsys, "push", str(trained[0]), "--to", str(tmp_path / "m"), "--no-page")
    assert code == 0
    assert "no license" in err
    assert out.startswith(f"{tmp_path}/m: 6 files, ")
    assert out.endswith("loaded by timm, transformers and model.weights\n")
    card = huggingface_hub.ModelCard.load(tmp_path / "m/README.md")
    assert card.data.license is None
    assert NO_LICENSE in card.text
    assert not (tmp_path / "m/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--license", "My License!"], ["--license=My License!", "apache-2.0"]),
        (["--to", "{}/no/where"], ["no does not exist"]),
        (["--to", "hf:a/b/c"], ["--to=hf:a/b/c", "hf:OWNER/NAME"]),
        (["--to", "hf:../x"], ["--to=hf:../x", "hf:OWNER/NAME"]),
        (["--to", "hf:a/b@v1"], ["give hf:a/b"]),
        (["--to", "{}/full"], ["is not a folder that push wrote"]),
        (["--to", "{}/file"], ["is not a folder that push wrote"]),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(trained, capsys, tmp_path, arguments, parts):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    to = [] if "--to" in arguments else ["--to", str(tmp_path / "m")]
    code, out, err = run(capsys, "push", str(trained[0]), *to, *(a.format(tmp_path) for a in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(part in err for part in parts), err
    assert {p.name for p in tmp_path.iterdir()} == {"full", "file"}


def test_a_folder_is_whole_or_as_it_was(trained, tmp_path, monkeypatch):
    run_dir, _ = trained
    target = tmp_path / "m"
    push(run_dir, str(target), license="mit", page=False)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(OutputError, match=r"exists already; .* --force"):
        push(run_dir, str(target), page=False)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpc_supcon.files._sync", full)
    for to in (target, tmp_path / "new"):
        with pytest.raises(OutputError, match="No space left"):
            push(run_dir, str(to), page=False, force=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    push(run_dir, str(target), page=False, force=True)
    assert "license" not in huggingface_hub.ModelCard.load(target / "README.md").data.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_damaged_folders_are_one_line(trained, tmp_path):
    model = trained[1]
    config, weights = (model / name for name in ("config.json", "model.safetensors"))
    good = json.loads(config.read_text())
    spoiled = {
        "no json": (b"{", None, "config.json is damaged"),
        "a list": (b"[1]", None, "is no description"),
        "of timm": (json.dumps({"architecture": "test_vit"}).encode(), None, "not of `hpc-supcon push`"),
        "no encoder": (json.dumps({"hpc_supcon": {"format": 1}}).encode(), None, "damaged, or written by another"),
        "other encoder": (json.dumps(good).replace("test_vit", "test_vit2").encode(), None, "damaged, or written"),
        "cut weights": (config.read_bytes(), weights.read_bytes()[:1000], "damaged, or written by another"),
    }
    for name, (text, payload, message) in spoiled.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(text)
        (folder / "model.safetensors").write_bytes(payload or weights.read_bytes())
        with pytest.raises(ConfigError, match=message):
            load_pushed(folder)
