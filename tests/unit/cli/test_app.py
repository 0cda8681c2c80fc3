"""Every mistake of the user: exit code 2, one clear line, no run folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from hpc_supcon.evaluation.probes import PROBES
from tests.commands import run
from tests.processes import Ranks

FAST = [
    "report.embeddings=false",
    "data.source=synthetic", "data.synthetic={images: 64, classes: 4, channels: 1, image_size: 8}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=2", "probe.linear.epochs=2", "probe.linear.lrs=[1e-2, 1e-1]", "log.tensorboard=false",
    "runtime.threads=1",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    """A small, right image folder that a test can then spoil."""
    for split, n in (("train", 8), ("test", 4)):
        for c, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = torch.full((8, 8), 20 * i + 100 * c, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_run_trains_evaluates_and_says_where(capsys, tmp_path):
    code, out, _ = run(capsys, "run", "default", *FAST, f"run_dir={tmp_path}/r")
    assert code == 0
    assert "accuracy" in out
    assert f"{tmp_path}/r/results.json" in out
    (result,) = json.loads((tmp_path / "r/results.json").read_text())["results"]
    assert {"stage", "encoder", "loss", "test", "validation"} <= set(result)
    assert set(result["test"]) == {"accuracy", "f1", "precision", "recall"}
    events = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    told = ["start", "end", *["probe/linear"] * 2, "probe", *["embedding"] * 2]
    assert [e["event"] for e in events if e["event"] != "train"] == told
    assert not list((tmp_path / "r").rglob("*.pkl")) + list((tmp_path / "r").rglob("*.pt"))


def test_pretrain_then_probe_gives_what_run_gives(capsys, tmp_path):
    run(capsys, "run", "default", *FAST, f"run_dir={tmp_path}/a")
    run(capsys, "pretrain", "default", *FAST, f"run_dir={tmp_path}/b")
    code, _, _ = run(capsys, "probe", f"{tmp_path}/b")
    assert code == 0
    a, b = (json.loads((tmp_path / x / "results.json").read_text())["results"][0] for x in "ab")
    assert a | {"seconds": 0} == b | {"seconds": 0}
    run(capsys, "probe", f"{tmp_path}/b", "probe.linear.epochs=3")
    again = json.loads((tmp_path / "b/results.json").read_text())["results"]
    assert len(again) == 1, "probing again replaces the entry"


def test_config_prints_yaml_that_reads_back_and_the_schema(capsys):
    code, out, _ = run(capsys, "config", "mnist", "optim.lr=0.25")
    assert code == 0
    assert "lr: 0.25" in out
    code, out, _ = run(capsys, "config", "--schema")
    assert code == 0
    assert "data.batch_size" in out
    assert "images" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.batchsize=4"], ["did you mean 'data.batch_size'"]),
        (["data.batch_size=many"], ["data.batch_size", "integer", "'many'"]),
        (["model.encoder=resnet19"], ["model.encoder", "'resnet19'", "did you mean 'resnet", "known: conv"]),
        (["data.source=imagnet"], ["data.source", "known:", "image_folder"]),
        (["data.loader=fast"], ["data.loader", "resident"]),
        (["loss.name=supcon"], ["loss.name", "supcon_out"]),
        (["loss.backend=cuda"], ["backend", "reference"]),
        (["data.source=mnist"], ["data.root"]),
        (["data.source=mnist", "data.root=/nowhere"], ["/nowhere", "data.download"]),
        (["data.source=image_folder", "data.root=/nowhere"], ["/nowhere"]),
        (["data.batch_size=4096"], ["fewer than one batch", "4096"]),
        (["data.views=1", "data.batch_size=2"], ["data.views=1", "no class repeats"]),
        (["data.validation_fraction=0"], ["probe.linear.lrs", "validation"]),
        (["loss.name=simclr", "data.views=1"], ["simclr", "data.views"]),
        (["loss.name=triplet", "loss.queue_size=10"], ["loss.queue_size", "triplet"]),
        (["model.momentum_encoder=0.9"], ["loss.queue_size"]),
        (["log.gradient_response=true", "loss.name=supcon_in"], ["log.gradient_response", "supcon_in"]),
        (["loss.name=reconstruction", "train.micro_batch_size=4"], ["train.micro_batch_size"]),
        (["loss.name=reconstruction", "model.encoder=resnet18", "model.stem=small"], ["resnet18 has no decoder"]),
        (["loss.temperature=0.001"], ["temperature", "0.002"]),
        (["optim.name=adamw", "optim.nesterov=true"], ["optim", "nesterov", "sgd and lars"]),
        (["optim.warmup_epochs=1", "optim.warmup_iterations=3"], ["optim.warmup_epochs and optim.warmup_iterations"]),
    ],
)
def test_wrong_settings_end_with_code_2_one_line_and_no_folder(capsys, tmp_path, arguments, parts):
    if arguments[0] == "data.source=mnist" or "image_folder" in arguments[0] or "imagnet" in arguments[0]:
        base = [a for a in FAST if not a.startswith("data.s")]
    else:
        base = FAST
    code, out, err = run(capsys, "run", "default", *base, *arguments, f"run_dir={tmp_path}/r")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.name=supcon_in"],
        ["loss.name=tcl", "log.gradient_response=true", "loss.k1=100"],
        ["loss.name=supcon_out", "log.gradient_response=true", "train.micro_batch_size=3"],
        ["loss.name=simclr", "data.views=3", "loss.queue_size=20"],
        ["loss.name=triplet", "loss.mining=random", "optim.lr=1e-3"],
        ["loss.name=cross_entropy", "data.views=1", "optim.lr=0.01"],
        ["loss.name=cross_entropy_mae"],
        ["loss.name=reconstruction", "optim.name=adamw", "optim.lr=1e-3"],
        ["loss.learnable_temperature=true", "loss.queue_size=40", "model.momentum_encoder=0.99"],
    ],
)
def test_every_loss_trains_by_name_and_goes_down(capsys, tmp_path, settings):
    mild = ["augment.crop_scale=[0.9, 1.0]", "augment.flip=0", "augment.brightness=0.1", "augment.contrast=0.1"]
    more = ["optim.lr=0.05", *mild, *settings, "log.every_steps=1", "train.epochs=25"]
    code, _, err = run(capsys, "run", "default", *FAST, *more, f"run_dir={tmp_path}/r")
    assert code == 0, err
    events = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "train"]
    # from step 3 on: by then a queue is full, and the loss is over as many columns as at the end
    assert sum(e["loss"] for e in steps[-10:]) < sum(e["loss"] for e in steps[3:13])
    if "log.gradient_response=true" in settings:
        assert all(0 <= e["response_negatives"] <= 1 and e["response_positives"] > 0 for e in steps)
    if "loss.learnable_temperature=true" in settings:
        assert steps[0]["temperature"] != steps[-1]["temperature"]
    if "supcon" in settings[0] or "tcl" in settings[0]:
        assert all(e["mean_positives"] > 1 for e in steps)
    code, _, err = run(capsys, "probe", f"{tmp_path}/r")
    assert code == 0, err


def test_collapsed_embeddings_are_reported_once(capsys, tmp_path):
    settings = [*FAST, "train.epochs=12", "log.every_steps=1", "optim.momentum=0.9", "loss.name=tcl", "loss.k1=5e4"]
    code, _, err = run(capsys, "pretrain", "default", *settings, "optim.lr=3", f"run_dir={tmp_path}/steep")
    assert code == 0, err
    assert err.count("the embeddings have collapsed") == 1
    events = [json.loads(line) for line in (tmp_path / "steep/metrics.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in events if e["event"] == "collapsed"] == [steps[-1]["step"]], (
        "so few may be a slow start"
    )
    assert steps[-1]["mean_similarity"] > 0.99
    code, _, err = run(capsys, "pretrain", "default", *settings, "optim.lr=1e-3", f"run_dir={tmp_path}/gentle")
    assert (code, "collapsed" in err) == (0, False)


@pytest.mark.usefixtures("forked_not_spawned")
def test_bench_loss_writes_a_table_and_a_picture(capsys, tmp_path):
    arguments = ["--size", "300", "--only", "dense", "--only", "tiled", "--runs", "1", "--threads", "1"]
    code, _, err = run(capsys, "bench", "loss", *arguments, "--out", str(tmp_path))
    assert code == 0, err
    (table,) = tmp_path.glob("*.json")
    results = json.loads(table.read_text())["results"]
    assert [r["name"] for r in results] == ["dense", "tiled"]
    assert results[1]["gradient_error"] < 1e-5
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as image:
        assert image.size[0] > 500
    code, _, err = run(capsys, "bench", "loss", "--only", "tilde")
    assert code == 2
    assert "did you mean 'tiled'" in err


def folder_run(capsys, tmp_path, images, *more):
    base = [a for a in FAST if not a.startswith("data.s")]
    arguments = ["run", "default", *base, "data.source=image_folder", f"data.root={images}", "data.batch_size=4"]
    code, _, err = run(capsys, *arguments, "data.validation_fraction=0.25", f"run_dir={tmp_path}/r", *more)
    return code, err


def test_a_right_image_folder_runs(capsys, tmp_path, images):
    code, err = folder_run(capsys, tmp_path, images)
    assert code == 0, err


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize("crop", ["false", "true"])
def test_every_loader_trains_the_same_images(capsys, tmp_path, images, loader, crop):
    code, err = folder_run(
        capsys, tmp_path, images, f"data.loader={loader}", f"data.crop_while_decoding={crop}", "data.image_size=8",
        "augment.policy=flip_crop",
    )  # fmt: skip
    assert code == 0, err
    (start, *_) = (json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines())
    assert start["loader"] == loader


def test_verify_and_convert_and_a_run_from_the_beton_files(capsys, tmp_path, images):
    code, out, err = run(capsys, "verify", str(images))
    assert code == 0, err
    assert "train: 16 images, 2 classes, 8x8: 16" in out
    code, out, err = run(capsys, "convert", str(images), str(tmp_path / "set.beton"))
    assert code == 0, err
    assert f"data.source=image_folder data.beton={tmp_path}/set.beton" in out
    code, err = folder_run(capsys, tmp_path, images, f"data.beton={tmp_path}/set.beton", "data.loader=resident")
    assert code == 0, err
    with (tmp_path / "set.train.beton").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    code, _, err = run(capsys, "verify", str(tmp_path / "set.train.beton"))
    assert code == 2
    assert "sha256" in err
    code, err = folder_run(capsys, tmp_path, images, f"data.beton={tmp_path}/set.beton", f"run_dir={tmp_path}/r2")
    assert code == 2
    assert "set.train.beton is damaged" in err
    code, err = folder_run(
        capsys, tmp_path, images, "data.source=mnist", f"data.beton={tmp_path}/set.beton", f"run_dir={tmp_path}/r2"
    )
    assert code == 2
    assert "contains 'image_folder/train', not 'mnist/train'" in err


def test_verify_names_every_image_that_cannot_be_used(capsys, images):
    (images / "train/dog/3.png").write_text("hello")
    (images / "test/cat/1.png").write_bytes(b"")
    code, out, err = run(capsys, "verify", str(images))
    assert code == 2
    assert "train/dog/3.png" in out
    assert "index 11" in out
    assert "test/cat/1.png" in out
    assert "2 images cannot be used" in err


def test_corrupt_images_are_replaced_and_counted_where_the_policy_says_so(capsys, tmp_path, images):
    (images / "train/dog/3.png").write_text("hello")
    for loader in ("resident", "torch"):
        code, err = folder_run(
            capsys, tmp_path, images, f"data.loader={loader}", "data.on_corrupt=replace", "log.every_steps=1",
            "data.validation_fraction=0", "probe.linear.lrs=[0.01]", f"run_dir={tmp_path}/{loader}",
        )  # fmt: skip
        assert code == 0, err
        lines = (tmp_path / loader / "metrics.jsonl").read_text().splitlines()
        assert max(json.loads(line).get("replaced_images", 0) for line in lines) >= 1


@pytest.mark.parametrize(
    "spoil", ["empty class", "not an image", "truncated", "mixed sizes", "test image", "no train"]
)
def test_spoilt_images_are_named_before_any_work(capsys, tmp_path, images, spoil):
    victim = images / "train/dog/3.png"
    if spoil == "empty class":
        victim = images / "train/eel"
        victim.mkdir()
    elif spoil == "not an image":
        victim.write_text("hello")
    elif spoil == "truncated":
        Image.effect_noise((8, 8), 50).save(victim)
        victim.write_bytes(victim.read_bytes()[:-40])
    elif spoil == "mixed sizes":
        Image.new("L", (9, 9)).save(victim)
    elif spoil == "test image":
        victim = images / "test/cat/1.png"
        victim.write_bytes(b"")
    else:
        victim = images / "train"
        victim.rename(images / "train2")
    code, err = folder_run(capsys, tmp_path, images)
    assert code == 2
    assert err.count("\n") == 1, err
    assert str(victim) in err
    assert not (tmp_path / "r").exists()


def test_a_used_folder_is_refused_and_resumed_only_with_the_same_settings(capsys, tmp_path):
    run(capsys, "pretrain", "default", *FAST, f"run_dir={tmp_path}/r")
    before = sorted(p.name for p in (tmp_path / "r").rglob("*"))
    code, _, err = run(capsys, "run", "default", *FAST, f"run_dir={tmp_path}/r")
    assert code == 2
    assert "--resume" in err
    code, _, err = run(capsys, "run", "default", *FAST, f"run_dir={tmp_path}/r", "optim.lr=0.3", "--resume")
    assert code == 2
    assert "optim.lr: 0.5 -> 0.3" in err
    assert sorted(p.name for p in (tmp_path / "r").rglob("*")) == before
    code, out, err = run(capsys, "run", "default", *FAST, f"run_dir={tmp_path}/r", "--resume")
    assert code == 0, err
    assert "going on from step 6" in err
    assert "accuracy" in out


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_that_holds_only_the_log_of_a_scheduler_is_new(capsys, tmp_path, more):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/slurm-17.out").write_text("prolog")
    code, _, err = run(capsys, "pretrain", "default", *FAST, "train.epochs=1", f"run_dir={tmp_path}/r", *more)
    assert code == 0, err
    assert (tmp_path / "r/config.yaml").is_file()
    assert (tmp_path / "r/slurm-17.out").read_text() == "prolog"


def test_resume_of_a_folder_that_does_not_exist_yet_starts_and_says_so(capsys, tmp_path):
    code, _, err = run(capsys, "pretrain", "default", *FAST, f"run_dir={tmp_path}/new", "--resume")
    assert code == 0
    assert "no checkpoint yet, starting from step 0" in err


def test_a_checkpoint_whose_bytes_changed_is_refused(capsys, tmp_path):
    run(capsys, "pretrain", "default", *FAST, f"run_dir={tmp_path}/r")
    (model,) = (tmp_path / "r").rglob("model.safetensors")
    payload = bytearray(model.read_bytes())
    payload[-1] ^= 1
    model.write_bytes(payload)
    for arguments in (
        ["probe", f"{tmp_path}/r"],
        ["pretrain", "default", *FAST, f"run_dir={tmp_path}/r", "--resume"],
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert err.count("\n") == 1, err
        assert str(model) in err
        assert "bytes changed" in err


def test_a_folder_that_is_no_run_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "probe", str(tmp_path))
    assert code == 2
    assert "config.yaml" in err
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "pretrain", "default", *FAST, f"run_dir={tmp_path}/file")
    assert code == 2
    assert "is a file" in err


def test_debug_shows_the_traceback(capsys, tmp_path):
    code, _, err = run(capsys, "run", "default", "optim.lr=x", "--debug")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["pretrain", "--help"], ["probe", "--help"], ["config", "--help"]]
)
def test_help_is_given(capsys, arguments):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "hpc-supcon" in out


def test_a_batch_not_divisible_by_the_ranks_ends_with_code_2_and_one_line(tmp_path):
    three = Ranks(["run", "default", *FAST, f"run_dir={tmp_path}/r"], tmp_path / "stderr", 3)
    assert three.end() == [2, 2, 2]
    lines = [line for line in three.stderr.splitlines() if "hpc-supcon: error" in line]
    assert len(lines) == 1
    assert "data.batch_size=16" in lines[0]
    assert "use 15 or 18" in lines[0]
    assert not (tmp_path / "r").exists()


def test_verify_names_damaged_files_whose_names_are_not_utf8(capsys, images):
    (images / "train" / "cat" / "0.png").write_text("no image")
    (images / "train" / "cat" / "0.png").rename(images / "train" / "cat" / os.fsdecode(b"\xff.png"))
    (images / "train" / ".cache").mkdir()
    code, out, err = run(capsys, "verify", str(images))
    assert code == 2
    assert "ff.png does not decode" in out
    lines = err.splitlines()
    assert lines[0] == f"{images}: passed over 1 folder: train/.cache"
    assert lines[1:] == [f"hpc-supcon: error: {images}: 1 images cannot be used"]


def test_scores_of_a_split_that_lacks_a_class_say_so(capsys, images, tmp_path):
    for path in (images / "test" / "dog").iterdir():
        path.unlink()
    data = ["data.source=image_folder", f"data.root={images}", "data.batch_size=8", "probe.kind=[knn, finetune]"]
    small = ["probe.knn.k=1", "probe.finetune.epochs=1", "probe.finetune.batch_size=8"]
    code, _, err = run(capsys, "run", "default", *FAST, *data, *small, f"run_dir={tmp_path}/r")
    assert code == 0, err
    assert err.count("no image of dog; its scores are averages over the other 1 of 2 classes") == 1
    for result in json.loads((tmp_path / "r/results.json").read_text())["results"]:
        assert result["test"]["absent"] == ["dog"]
        assert "absent" not in result["validation"]


@pytest.fixture
def one_class(images):
    """Settings of an image folder that has cats only."""
    for split in ("train", "test"):
        shutil.rmtree(images / split / "dog")
    return ["data.source=image_folder", f"data.root={images}", "data.batch_size=4", "data.views=2"]


LABELED = ["supcon_out", "supcon_in", "tcl", "triplet", "cross_entropy", "cross_entropy_mae"]
ONE_OF_TWO = "loss.terms={simclr: 1.0, cross_entropy: 0.5}"


@pytest.mark.parametrize(
    ("command", "settings", "what"),
    [
        *(("pretrain", [f"loss.name={name}"], f"loss {name}") for name in LABELED),
        ("pretrain", [ONE_OF_TWO], "loss cross_entropy"),
        ("pretrain", [ONE_OF_TWO, "loss.supervised=false"], "loss cross_entropy"),
        ("pretrain", ["loss.name=simclr", "validation.every_epochs=1", "validation.probe.kind=linear"], "validation"),
        *(("run", ["loss.name=simclr", f"probe.kind={kind}"], f"probe.kind={kind} ") for kind in PROBES),
    ],
)
def test_one_class_is_refused_by_what_tells_classes_apart(capsys, tmp_path, one_class, command, settings, what):
    code, out, err = run(capsys, command, "default", *FAST[2:], *one_class, *settings, f"run_dir={tmp_path}/r")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"error: {what}" in err
    assert "tells classes apart, but all training images are of one, cat: add images" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["simclr", "reconstruction", "supcon_out"])
def test_one_class_is_enough_for_what_compares_no_labels(capsys, tmp_path, one_class, name):
    unlabeled = ["loss.supervised=false"] if name == "supcon_out" else []
    settings = [*FAST[2:], *one_class, f"loss.name={name}", *unlabeled, "train.epochs=1"]
    code, _, err = run(capsys, "pretrain", "default", *settings, f"run_dir={tmp_path}/r")
    assert code == 0, err
