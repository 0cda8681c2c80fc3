"""`verify` and `convert` take the settings of the data as `run` does, and agree with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon import cli
from hpc_supcon.config import load_config
from hpc_supcon.data import load_splits
from hpc_supcon.data.loaders import LoaderOptions, build_loader
from hpc_supcon.data.order import EvalOrder
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import HpcSupconError
from hpc_supcon.export import open_images
from hpc_supcon.training.data import load_data


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return stopped.value.code or 0, out, err


def picture(mode="RGB", size=(8, 8), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def root(tmp_path):
    """Two classes of four RGB images."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                picture(seed=i).save(folder / f"{i}.png")
    return tmp_path / "images"


def spoil(path: Path, kind: str) -> None:
    """Put another file in the place of an image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in ("L", "P", "RGBA", "LA", "1", "CMYK"):
        picture(kind).save(path, "TIFF" if kind == "CMYK" else "PNG")
    elif kind == "turned":
        picture(size=(8, 12)).save(path, "JPEG", exif=exif)
    elif kind == "deep":
        Image.new("I;16", (8, 8)).save(path)
    elif kind == "tga":
        picture().save(path, "TGA")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "wide":
        picture(size=(12, 8)).save(path)


@pytest.mark.parametrize(
    "settings",
    [{}, {"channels": 3}, {"channels": 1, "image_size": 8}, {"image_size": 4, "exif": "ignore"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK", "turned", "deep", "tga", "cut", "wide"])
@pytest.mark.parametrize("name", ["cat/0.png", "dog/2.png"])
def test_verify_passes_what_training_loads_and_refuses_what_it_refuses(capsys, root, kind, settings, name):
    spoil(root / "train" / name, kind)
    code, out, err = run(capsys, "verify", root, *(f"data.{key}={value}" for key, value in settings.items()))
    refusal = refusal_of_training(root, settings)
    assert code == (0 if refusal is None else 2), out + err
    if refusal is not None:
        assert refusal.split(": set")[0].split(" (image ")[0] in out + err


def refusal_of_training(root, settings) -> str | None:
    """What loading the training images raises."""
    try:
        source = load_splits("image_folder", root=root, validation_fraction=0, **settings).train
        order, where = EvalOrder(len(source), 8), {"seed": 0, "rank": 0, "world_size": 1, "device": "cpu"}
        build_loader("resident", source, order, **where, options=LoaderOptions()).close()
    except HpcSupconError as error:
        return str(error)
    return None


def test_convert_takes_channels_for_mixed_modes_and_says_so(capsys, root, tmp_path):
    for i, mode in enumerate(("L", "P", "RGBA")):
        picture(mode).save(root / "train/cat" / f"{i + 1}.png")
    code, _, err = run(capsys, "convert", root, tmp_path / "a.beton")
    assert code == 2
    assert "data.channels=3" in err
    code, out, err = run(capsys, "convert", root, tmp_path / "a.beton", "data.channels=3", "--raw-fraction", "1")
    assert code == 0, err
    in_files = load_splits("image_folder", root=root, channels=3, validation_fraction=0).train
    in_beton = load_splits("image_folder", beton=tmp_path / "a.beton", validation_fraction=0).train
    assert torch.equal(in_files.stack(), in_beton.stack())
    assert f"use: data.source=image_folder data.beton={tmp_path}/a.beton\n" in out
    assert run(capsys, "verify", tmp_path / "a.train.beton")[0] == 0


def test_what_convert_says_to_use_is_what_a_run_reads(capsys, root, tmp_path):
    _, out, _ = run(capsys, "convert", root, tmp_path / "a.beton", "data.exif=ignore")
    assert f"data.beton={tmp_path}/a.beton data.exif=ignore" in out
    code, _, err = run(capsys, "verify", tmp_path / "a.train.beton")
    assert code == 2
    assert "data.exif=ignore" in err
    assert run(capsys, "verify", tmp_path / "a.train.beton", "data.exif=ignore")[0] == 0


def test_convert_takes_the_settings_of_other_sources(capsys, tmp_path):
    small = "data.synthetic={images: 24, classes: 3, channels: 1, image_size: 8}"
    code, out, err = run(capsys, "convert", "synthetic", tmp_path / "a.beton", small)
    assert code == 0, err
    assert "train: 24 images" in out
    assert load_splits("synthetic", beton=tmp_path / "a.beton").channels == 1


@pytest.mark.parametrize("command", [["verify"], ["convert", "OUT"], ["bench", "loader"]], ids=" ".join)
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.lr=1", "settings of the data alone"),
        ("data.chanels=3", "data.channels"),
        ("data.channels=2", "data.channels"),
        ("data.root=/elsewhere", "say what data.root is"),
        ("nonsense", "key.sub=value"),
    ],
)
def test_a_setting_that_a_command_cannot_take_is_refused(capsys, root, tmp_path, command, setting, says):
    name, *rest = (str(tmp_path / "a.beton") if word == "OUT" else word for word in command)
    given = [name, *rest, setting] if name == "bench" else [name, str(root), *rest, setting]
    code, _, err = run(capsys, *given)
    assert code == 2
    assert says in err
    assert not list(tmp_path.glob("a.*"))


def test_a_name_that_is_no_text_is_shown_with_escapes(capsys, root):
    (Path(os.fsdecode(os.fsencode(root) + b"/train/cat/caf\xe9.png"))).write_bytes(b"")
    code, out, err = run(capsys, "verify", root)
    assert code == 2
    assert "caf\\xe9.png does not decode: the file is empty" in out
    assert "1 images cannot be used" in err


def test_a_folder_whose_name_is_no_text_is_verified_and_converted(capsys, root, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    root.rename(odd)
    assert run(capsys, "verify", odd)[0] == 0
    code, out, _ = run(capsys, "convert", odd, odd / "a.beton")
    assert code == 0
    assert "caf\\xe9/a.beton" in out


def test_a_damaged_first_file_is_listed_with_the_others(capsys, root):
    spoil(root / "train/cat/0.png", "cut")
    spoil(root / "train/dog/1.png", "cut")
    code, out, err = run(capsys, "verify", root)
    assert code == 2
    assert out.count("does not decode") == 2
    assert "2 images cannot be used" in err


@pytest.mark.parametrize("exif", ["transpose", "ignore"])
def test_a_run_reads_images_as_data_exif_says(root, exif):
    for path in root.rglob("*.png"):
        tag = Image.Exif()
        tag[0x0112] = 3
        picture().save(path, exif=tag)
    settings = ["data.source=image_folder", f"data.root={root}", f"data.exif={exif}", "data.validation_fraction=0"]
    data = load_data(load_config("default", settings), Runtime(Launch(), torch.device("cpu")))
    upright = picture().rotate(180 if exif == "transpose" else 0)
    for source in (data.splits.train, data.splits.test):
        assert torch.equal(source.read(0), torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def test_images_to_embed_follow_the_setting_of_a_beton_too(capsys, root, tmp_path):
    run(capsys, "convert", root, tmp_path / "a.beton", "data.exif=ignore")
    beton = tmp_path / "a.train.beton"
    assert len(open_images([beton], (3, 8, 8), (), exif="ignore").paths) == 8
    with pytest.raises(HpcSupconError, match=r"data\.exif=ignore"):
        open_images([beton], (3, 8, 8), ())
