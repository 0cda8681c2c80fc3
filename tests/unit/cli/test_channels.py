"""Every command on images of five channels of 16 bits: synthetic ones, and a folder of .npy and TIFF files."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_supcon import run_folder
from hpc_supcon.checkpoint import load_newest
from hpc_supcon.data import load_splits
from hpc_supcon.pages.thumbnails import read_thumbnails
from tests.commands import run, succeed

tifffile = pytest.importorskip("tifffile")
FAST = [
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=1", "optim.lr=0.05", "log.tensorboard=false", "runtime.threads=1", "runtime.device=cpu",
    "probe.kind=[knn, softmax]", "probe.knn.k=1", "probe.softmax.epochs=1", "report.methods=[pca]",
]  # fmt: skip
MADE = ["data.source=synthetic", "data.synthetic={images: 48, classes: 3, channels: 5, image_size: 12, bits: 16}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12-bit images in 16, told apart by their fourth channel: .npy of both layouts and TIFF."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(("crop", "water")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 3000, (5, 14, 12), dtype=np.uint16)
                image[3] = image[3] // 4 + 2000 * label
                path = root / split / name / f"{i:02}"
                if i % 3:
                    np.save(path.with_suffix(".npy"), image if i % 3 == 1 else image.transpose(1, 2, 0))
                else:
                    tifffile.imwrite(path.with_suffix(".tif"), image.transpose(1, 2, 0), planarconfig="contig")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """(folder of a run on `folder`, what it printed)."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = [*FAST, f"run_dir={path}", "data.source=image_folder", f"data.root={folder}", "data.image_size=12"]
    settings += ["data.loader=torch", "data.workers=1", "data.crop_while_decoding=true"]
    succeed("run", *settings)
    return path


def test_a_run_on_synthetic_images_says_what_the_policy_leaves_out(capsys, tmp_path):
    code, out, err = run(capsys, "run", *MADE, *FAST, f"run_dir={tmp_path / 'run'}", "loss.name=simclr")
    assert code == 0, err
    line = "augment.policy=simaugment: no color jitter and no gray views, for images of 5 channels"
    assert (out + err).count(line) == 1


def test_a_folder_goes_through_all_stages(trained, folder):
    results = {result["probe"]: result for result in run_folder.read_results(trained)}
    assert results["softmax"]["test"]["accuracy"] == 1.0
    found, _ = load_newest(trained / run_folder.CHECKPOINTS)
    stored = load_splits("image_folder", root=folder, image_size=12, validation_fraction=0.1)
    x = stored.train.stack().double().numpy() / 65535
    normalization = found.state["normalization"]
    assert normalization["bits"] == 16
    np.testing.assert_allclose(normalization["mean"], x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(normalization["std"], x.std((0, 2, 3)), rtol=1e-5)
    assert found.state["encoder"]["in_channels"] == 5
    with Image.open(trained / "embeddings" / "thumbnails.webp") as sheet:
        assert np.asarray(sheet).std() > 30  # 12 bits of 16 are not shown as black
    assert read_thumbnails(trained / "embeddings").tile == (12, 12)
    assert (trained / "report.html").is_file()


@pytest.mark.parametrize("file_format", ["safetensors", "torchscript", "onnx"])
def test_exported_parts_say_how_pixels_are_scaled(capsys, trained, tmp_path, file_format):
    path = tmp_path / "encoder"
    code, _, err = run(capsys, "export", trained, "--format", file_format, "-o", path)
    assert code == 0, err
    if file_format == "safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["input"] == "float32 [N, 5, 12, 12], 5 channels, normalized: (pixel / 65535 - mean) / std"
    if file_format == "torchscript":
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("metadata.json"))
            assert "0..1 (pixel / 65535), not normalized" in json.loads(archive.read(name))["input"]


def test_files_are_embedded_and_classified_and_others_refused(capsys, trained, folder, tmp_path):
    test = folder / "test"
    code, out, err = run(capsys, "embed", trained, test, "-o", tmp_path / "e.npz")
    assert (code, "16 images, 128 numbers each, with labels" in out) == (0, True), err
    code, out, err = run(capsys, "predict", trained, test, "--probe", "softmax", "-o", tmp_path / "p.json")
    assert code == 0, err
    images = json.loads((tmp_path / "p.json").read_text())["images"]
    assert all(image["class"] in image["path"] for image in images)
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    code, _, err = run(capsys, "embed", trained, tmp_path / "a.png", "-o", tmp_path / "f.npz")
    assert code == 2
    assert "a.png" in err
    assert err.count("\n") == 1


def test_verify_and_convert(capsys, folder, tmp_path):
    code, out, err = run(capsys, "verify", folder, "data.channels=5", "data.image_size=12")
    assert (code, "train: 48 images, 2 classes, 12x14: 48" in out) == (0, True), err
    code, _, err = run(capsys, "verify", folder, "data.channels=4", "data.image_size=12")
    assert (code, "5 channels, but data.channels=4" in err) == (2, True)
    code, _, err = run(capsys, "convert", folder, tmp_path / "a.beton", "data.channels=5")
    assert (code, "holds 8-bit images of 1 or 3 channels, but these have 5 of 16 bits" in err) == (2, True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["augment.policy=randaugment"],
            "augment.policy=randaugment changes 8-bit images of 1 or 3 channels, but these",
        ),
        (
            ["data.loader=dali"],
            "data.loader=dali decodes 8-bit images of 1 or 3 channels, but these have 5 of 16 bits",
        ),
        (["probe.corruptions=fog"], "probe.corruptions are for 8-bit images of 1 or 3 channels, but these have 5"),
        (["probe.ood=digits"], "probe.ood=digits: the images have 1 channel, but data.channels=5"),
        (["probe.transfer=digits"], "probe.transfer=digits: the images have 1 channel, but data.channels=5"),
    ],
)
def test_what_five_channels_do_not_have_is_refused_once_the_data_is_known(capsys, folder, tmp_path, settings, said):
    target = tmp_path / "run"
    data = ["data.source=image_folder", f"data.root={folder}", "data.image_size=12", f"run_dir={target}"]
    code, _, err = run(capsys, "run", *FAST, *data, "probe.kind=knn", *settings)
    assert (code, said in err) == (2, True), err
    assert err.strip().count("\n") == 0
    assert not target.exists()


def test_a_run_of_16_bits_is_not_transferred_to_8(capsys, tmp_path):
    """Gray images, which data of any depth can be converted to."""
    made = "data.synthetic={images: 48, classes: 3, channels: 1, image_size: 8, bits: 16}"
    target = tmp_path / "run"
    code, _, err = run(capsys, "pretrain", *FAST, "data.source=synthetic", made, f"run_dir={target}")
    assert code == 0, err
    for asked in (["probe.transfer=digits"], ["probe.ood=digits"], ["data.source=digits"]):
        code, _, err = run(capsys, "probe", target, "probe.kind=knn", *asked)
        assert (code, "images of 8 bits per channel, but the model is for 16" in err) == (2, True), err


def test_an_autoencoder_of_many_channels_is_trained_and_drawn(capsys, tmp_path):
    """32 channels: as many as the last but one layer of the decoder has."""
    made = "data.synthetic={images: 32, classes: 2, channels: 32, image_size: 8, bits: 16}"
    target = tmp_path / "run"
    settings = [*FAST, "data.source=synthetic", made, "loss.terms={reconstruction: 1}", "augment.policy=flip_crop"]
    code, _, err = run(capsys, "run", *settings, f"run_dir={target}", "probe.kind=knn")
    assert code == 0, err
    assert (target / "plots" / "reconstructions.png").is_file()
    found, _ = load_newest(target / run_folder.CHECKPOINTS)
    normed = [name for name in found.tensors["model"] if name.startswith("heads.decoder") and "running_mean" in name]
    assert len(normed) == 2


def test_the_example_trains_on_the_files_that_it_writes(python, tmp_path):
    example = Path(__file__).parents[3] / "examples" / "many_channels.py"
    assert len(example.read_text().splitlines()) <= 25
    done = subprocess.run([python, example, tmp_path / "a"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no color jitter" in done.stdout + done.stderr
    assert run_folder.read_results(tmp_path / "a" / "run")[0]["test"]["accuracy"] > 0.9
