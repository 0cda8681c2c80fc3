"""`hpc-supcon init` looks at a folder and writes a recipe that can be run."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.cli import main
from hpc_supcon.config import load_config
from hpc_supcon.stages import first_recipe


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(["init", *map(str, arguments)])
    return exit.value.code or 0


def save(path, width, height, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def folder(root, sizes=((32, 32),), mode="RGB", per_class=30):
    for split, n in (("train", per_class), ("test", 4)):
        for name in ("cat", "dog"):
            for i in range(n):
                save(root / split / name / f"{i}.png", *sizes[i % len(sizes)], mode)
    return root


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """So that epochs do not depend on the machine."""
    monkeypatch.setattr(first_recipe, "_views_per_second", lambda *_: 100.0)


def test_images_of_one_size(tmp_path, capsys):
    data, out = folder(tmp_path / "pets"), tmp_path / "r.yaml"
    assert run(data, "-o", out, "--minutes", "1") == 0
    assert "image_folder, 60 training images, 2 classes, 32 px, color" in capsys.readouterr().out
    config = load_config(str(out))
    assert (config.name, config.data.source, config.data.root) == ("pets", "image_folder", str(data))
    assert (config.data.image_size, config.data.channels) == (None, None)
    assert (config.augment.policy, config.augment.flip, config.loss.name) == ("pad_crop", 0.5, "supcon_out")
    assert config.data.batch_size == 16
    assert config.train.epochs == 30  # 0.6 x 60 s x 100 views/s / (60 images x 2 views)


@pytest.mark.parametrize(("bf16", "precision", "epochs"), [(200.0, "bf16", 60), (110.0, "auto", 30)])
def test_bf16_is_chosen_where_the_cpu_is_faster_in_it(tmp_path, monkeypatch, bf16, precision, epochs):
    def rate(*arguments):
        return bf16 if arguments[-1] == torch.bfloat16 else 100.0

    monkeypatch.setattr(first_recipe, "_views_per_second", rate)
    out = tmp_path / "r.yaml"
    assert run(folder(tmp_path / "pets"), "-o", out, "--minutes", "1") == 0
    config = load_config(str(out))
    assert (config.train.precision, config.train.epochs) == (precision, epochs)


def test_mixed_sizes_and_modes_get_a_size_and_channels_and_the_recipe_runs(tmp_path):
    data, out = folder(tmp_path / "mixed", sizes=((50, 70), (90, 60), (64, 64))), tmp_path / "r.yaml"
    save(data / "train" / "cat" / "gray.png", 80, 80, "L")
    assert run(data, "-o", out, "--minutes", "0.1", "--not-mirrored") == 0
    config = load_config(str(out))
    assert (config.data.image_size, config.data.channels, config.augment.flip) == (32, 3, 0.0)
    with pytest.raises(SystemExit) as exit:
        main(
            ["run", str(out), f"run_dir={tmp_path / 'run'}", "train.epochs=2", "report.embeddings=false",
             "report.html=false", "log.progress=false"]
        )  # fmt: skip
    assert not exit.value.code
    assert (tmp_path / "run" / "results.json").exists()


def test_gray_images_are_not_mirrored_and_keep_their_channel(tmp_path):
    out = tmp_path / "r.yaml"
    assert run(folder(tmp_path / "signs", sizes=((28, 28),), mode="L"), "-o", out) == 0
    config = load_config(str(out))
    assert (config.model.encoder, config.augment.policy, config.augment.flip) == ("conv", "flip_crop", 0.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_it_asks_and_asks_again_after_a_wrong_answer(tmp_path, monkeypatch, capsys):
    data, out = folder(tmp_path / "pets"), tmp_path / "mine.yaml"
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    answers = [data, "supcom", "tcl", "n", "-1", "nan", "soon", "1e999", "0.5", out]
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{answer}\n" for answer in answers)))
    assert run() == 0
    said = capsys.readouterr().out
    for wrong in (
        "did you mean 'supcon'?",
        "-1 is not a number from 0.1",
        "nan is",
        "'soon' is not a number",
        "1e999",
    ):
        assert wrong in said
    config = load_config(str(out))
    assert (config.loss.name, config.augment.flip) == ("tcl", 0.0)
    monkeypatch.setattr("sys.stdin", Terminal("\n" * 4))
    assert run(data, "--out", tmp_path / "defaults.yaml") == 0
    assert load_config(str(tmp_path / "defaults.yaml")).loss.name == "supcon_out"


def test_in_a_notebook_it_does_not_wait_for_answers_that_nobody_can_give(tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.setattr("sys.stdin", Terminal())
    assert run(folder(tmp_path / "pets"), "-o", tmp_path / "r.yaml") == 0
    assert run() == 2


def test_images_without_labels(tmp_path, capsys):
    for i in range(40):
        save(tmp_path / "flat" / f"{i}.jpg", 32, 32)
    out = tmp_path / "r.yaml"
    assert run(tmp_path / "flat", "-o", out) == 0
    assert "hpc-supcon pretrain" in capsys.readouterr().out
    config = load_config(str(out))
    assert (config.data.labels, config.loss.name, config.augment.policy) == ("none", "simclr", "simaugment")
    assert run(tmp_path / "flat", "-o", tmp_path / "s.yaml", "--objective", "supcon") == 2
    assert "needs labels" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("objective", first_recipe.LOSSES)
@pytest.mark.parametrize(("side", "uniform"), [(32, True), (300, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_combination_is_a_valid_configuration(tmp_path, device, objective, side, uniform, channels):
    facts = first_recipe.DataFacts(
        "image_folder", tmp_path, 5000, {"a": 4900, "b": 100}, side, uniform, channels, mixed_modes=not uniform
    )
    settings = first_recipe.recipe(facts, objective, mirrored=True, minutes=10, device=device)
    path = tmp_path / "r.yaml"
    path.write_text(first_recipe.to_yaml(settings, facts))
    config = load_config(str(path), stages=("pretrain", "probe"))
    assert config.data.views == (1 if objective == "cross_entropy" else 2)
    assert config.loss.name == first_recipe.LOSSES[objective]
    assert "long_tail_aware" in path.read_text()
    assert (config.data.image_size is None) == (uniform and side == 32)


def test_bad_input(tmp_path, capsys):
    assert run() == 2
    assert "name the folder" in capsys.readouterr().err
    assert run(tmp_path / "none") == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    data = folder(tmp_path / "pets")
    out = tmp_path / "r.yaml"
    out.write_text("mine")
    assert run(data, "-o", out) == 2
    assert out.read_text() == "mine"
    for minutes in ("nan", "inf", "0", "soon"):
        assert run(data, "-o", tmp_path / "x.yaml", "--minutes", minutes) == 2
        assert "is not a number" in capsys.readouterr().err
    assert run(data, "-o", tmp_path / "x.yaml", "--objective", "supcom") == 2
    assert "supcon" in capsys.readouterr().err
    (tmp_path / "two" / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "two" / "cifar-10-batches-py").mkdir()
    assert run(tmp_path / "two") == 2
    assert "mnist, cifar10" in capsys.readouterr().err
