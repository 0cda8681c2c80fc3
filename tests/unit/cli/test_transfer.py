"""Training on images without labels, and probes of an encoder on other data than its run's own."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hpc_supcon import run_folder
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform, load_splits
from hpc_supcon.errors import DataError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.pages.compare import compare
from hpc_supcon.pages.read import read_runs
from hpc_supcon.pages.runs import page_of_runs
from hpc_supcon.training.objective import Objective
from tests.commands import run, succeed

FAST = [
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=2", "optim.lr=0.05", "log.tensorboard=false", "log.progress=false", "runtime.threads=1",
    "runtime.device=cpu", "probe.kind=knn", "probe.knn.k=1", "report.methods=[pca]",
]  # fmt: skip
RGB = ["data.source=synthetic", "data.synthetic={images: 64, classes: 3, channels: 3, image_size: 12}"]


def write_images(folder, count, seed, low=0, high=256):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(low, high, (14, 12, 3), dtype=np.uint8)).save(folder / f"{seed}-{i:02}.png")


def results_of(folder):
    return {result["probe"]: result for result in run_folder.read_results(folder)}


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """60 images in one folder, some of them deeper, and a file that is none."""
    root = tmp_path_factory.mktemp("flat")
    for seed, place in enumerate((".", "a", "a/b")):
        write_images(root / place, 20, seed)
    (root / "license.txt").write_text("free")
    return root


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Two classes, dark and bright, with a test set, in class folders."""
    root = tmp_path_factory.mktemp("labeled") / "dark and bright"
    for split, count in (("train", 20), ("test", 8)):
        write_images(root / split / "dark", count, 0, 0, 100)
        write_images(root / split / "bright", count, 1, 150, 256)
    return root


@pytest.fixture(scope="module")
def unlabeled_run(flat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabeled") / "r"
    source = ["data.source=image_folder", f"data.root={flat}", "data.labels=none", "data.image_size=12"]
    succeed("run", "default", *FAST, *source, "loss.name=simclr", "validation.every_epochs=1", f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def labeled_run(tmp_path_factory):
    """A run of three classes, RGB, 12 x 12 pixels, whose probes are also fitted on digits: ten, gray, 8 x 8."""
    folder = tmp_path_factory.mktemp("own") / "r"
    succeed("run", "default", *FAST, *RGB, "probe.transfer=digits", "report.embeddings=false", f"run_dir={folder}")
    return folder


def test_a_folder_without_labels_is_trained_on_probed_on_labeled_data_and_transfers(
    capsys, flat, labeled, unlabeled_run, tmp_path
):
    """The three commands of the README."""
    folder = tmp_path / "r"
    shutil.copytree(unlabeled_run, folder)
    assert not results_of(folder)
    code, _, err = run(capsys, "probe", folder, "data.source=image_folder", f"data.root={labeled}")
    assert code == 0, err
    assert "2 classes, read as RGB images of 12 x 12 pixels and normalized as it was trained" in err
    code, _, err = run(capsys, "probe", folder, "probe.transfer=[digits]")
    assert code == 0, err
    found = results_of(folder)
    (dark, digits) = found
    assert re.fullmatch(r"knn@dark_and_bright-[0-9a-f]{6}", dark)
    assert digits == "knn@digits"
    assert (found[dark]["classes"], found[digits]["classes"]) == (2, 10)
    assert (found[dark]["data"], found[digits]["data"]) == (dark.removeprefix("knn@"), "digits")
    assert found[dark]["test"]["accuracy"] > 0.7  # dark from bright


def test_images_without_labels_are_split_at_random_and_drawn_in_one_color(flat, unlabeled_run):
    whole = load_splits("image_folder", root=flat, labels="none", image_size=12, validation_fraction=0)
    assert (len(whole.train), whole.validation, whole.test, whole.classes) == (60, None, None, ())
    split, again, other = (
        load_splits("image_folder", root=flat, labels="none", image_size=12, seed=seed, validation_fraction=0.25)
        for seed in (0, 0, 1)
    )
    assert sorted([*split.train.paths, *split.validation.paths]) == sorted(whole.train.paths)
    assert len(split.validation) == 15
    assert split.validation.paths == again.validation.paths != other.validation.paths
    with np.load(unlabeled_run / "embeddings/encoder-pca.npz") as drawn:
        assert len(drawn["classes"]) == 0
        assert len(drawn["points"]) == 6  # the validation split
    page = page_of_runs([unlabeled_run])
    assert dict(page.facts)["data"] == "image_folder (no labels)"
    one = page.data["runs"][0]["maps"][0]
    assert (one["labeled"], one["classes"]) == (False, ["no labels"])
    assert any("no labels, so no probes" in notice for notice in page.notices)
    state = json.loads(next(unlabeled_run.glob("checkpoints/step-*/state.json")).read_text())
    assert state["classes"] == []


def test_training_resumes_and_refuses_images_that_were_added(capsys, flat, unlabeled_run, tmp_path):
    folder, root = tmp_path / "r", tmp_path / "flat"
    shutil.copytree(unlabeled_run, folder)
    shutil.copytree(flat, root)
    config = (folder / "config.yaml").read_text().replace(str(flat), str(root))
    (folder / "config.yaml").write_text(config.replace(str(unlabeled_run), str(folder)))
    code, _, err = run(capsys, "pretrain", folder / "config.yaml", "--resume")
    assert code == 0, err
    write_images(root / "a", 1, 9)
    code, _, err = run(capsys, "pretrain", folder / "config.yaml", "--resume")
    assert code == 2
    assert "1 image more in train" in err


def test_positives_of_simclr_are_views_whatever_the_labels():
    """Images without labels all have label 0: were it used, the alignment would be that of all pairs."""
    views = F.normalize(torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    objective = Objective({"simclr": 1.0}, load_config("default").loss.model_dump())
    numbers = objective.embedding_numbers({"projection": views}, torch.zeros(7, dtype=torch.int64))
    of_views = (views[:, 0].double() - views[:, 1].double()).square().sum(dim=1).mean()
    assert float(numbers["alignment"]) == pytest.approx(float(of_views), rel=1e-5)


def test_scores_of_other_data_are_those_of_the_encoder_with_its_own_normalization(labeled_run):
    digits = load_splits("digits")
    model, found = load_model(labeled_run)
    transform = EvalTransform(**found.state["normalization"])
    rows = {}
    for split in ("train", "test"):
        source = getattr(digits, split)
        pixels = source.stack().float().expand(-1, 3, -1, -1)
        pixels = F.interpolate(pixels, size=(12, 12), mode="bilinear", antialias=True).round().clamp(0, 255)
        with torch.no_grad():
            rows[split] = F.normalize(model.encoder.eval()(transform(pixels.to(torch.uint8))).double(), dim=1)
    nearest = (rows["test"] @ rows["train"].T).argmax(dim=1)
    accuracy = (digits.train.labels[nearest] == digits.test.labels).double().mean()
    assert results_of(labeled_run)["knn@digits"]["test"]["accuracy"] == pytest.approx(float(accuracy), abs=0.006)
    assert accuracy > 0.5


def test_other_data_replace_nothing_of_the_run_s_own(labeled_run):
    found, scores = results_of(labeled_run), run_folder.read_scores(labeled_run)
    assert [(name, r["data"], r["classes"]) for name, r in found.items()] == [
        ("knn", "synthetic", 3), ("knn@digits", "digits", 10),
    ]  # fmt: skip
    assert {name: len(entry["classes"]) for name, entry in scores["probes"].items()} == {"knn": 3, "knn@digits": 10}
    assert list(scores["embedding"]) == ["encoder", "projection", "encoder@digits", "projection@digits"]
    table = pq.read_table(labeled_run / "predictions.parquet").to_pydict()
    widths = {(p, len(row)) for p, row in zip(table["probe"], table["probabilities"], strict=True)}
    assert widths == {("knn", 3), ("knn@digits", 10)}
    assert sorted(path.name for path in (labeled_run / "probes").iterdir()) == ["knn", "knn@digits"]


def test_both_ways_to_name_other_data_give_the_same(capsys, labeled_run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(labeled_run, folder)
    before = results_of(folder)
    code, _, err = run(capsys, "probe", folder, "data.source=digits")
    assert code == 0, err
    after = results_of(folder)
    assert list(after) == list(before)
    for name in before:
        assert {**after[name], "seconds": 0} == {**before[name], "seconds": 0}


def test_a_copy_of_the_run_s_own_folder_is_its_own_data(capsys, labeled, tmp_path):
    folder, copy = tmp_path / "r", tmp_path / "copy"
    source = ["data.source=image_folder", f"data.root={labeled}", "data.image_size=12", "report.embeddings=false"]
    succeed("run", "default", *FAST, *source, f"run_dir={folder}")
    shutil.copytree(labeled, copy)
    code, _, err = run(capsys, "probe", folder, f"data.root={copy}")
    assert code == 0, err
    assert list(results_of(folder)) == ["knn"]
    (copy / "test/dark/0-00.png").unlink()
    code, _, err = run(capsys, "probe", folder, f"data.root={copy}")
    assert code == 0, err
    own, other = results_of(folder)
    assert own == "knn"
    assert other.startswith("knn@copy-")


def test_runs_are_compared_on_each_data_set_alone(capsys, labeled_run, unlabeled_run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(unlabeled_run, folder)
    assert run(capsys, "probe", folder, "data.source=digits")[0] == 0
    comparison = compare(read_runs([labeled_run, folder]))
    own, other = comparison.groups
    assert ("knn, test", "accuracy") in own.values
    assert ("knn, test", "accuracy") not in other.values
    want = (
        results_of(folder)["knn@digits"]["test"]["accuracy"]
        - results_of(labeled_run)["knn@digits"]["test"]["accuracy"]
    )
    assert comparison.difference(other, "knn@digits, test", "accuracy")[0] == pytest.approx(want)
    page = page_of_runs([labeled_run])
    assert [h.label for h in page.headlines] == ["knn probe, test accuracy", "knn@digits probe, test accuracy"]
    assert "359 test images" in page.headlines[1].detail


def test_a_probe_of_other_data_predicts(capsys, labeled, labeled_run):
    code, out, err = run(capsys, "predict", labeled_run, labeled / "test/dark", "--probe", "knn@digits")
    assert code == 0, err
    assert "0-00.png" in out


def test_unlabeled_images_are_converted_and_embedded(capsys, flat, unlabeled_run, tmp_path):
    code, out, err = run(capsys, "convert", flat, tmp_path / "a.beton", "data.labels=none", "data.channels=3")
    assert code == 0, err
    assert "data.labels=none" in out
    splits = load_splits("image_folder", beton=tmp_path / "a.beton", labels="none", image_size=12)
    assert (len(splits.train), len(splits.validation), splits.test, splits.classes) == (54, 6, None, ())
    assert run(capsys, "embed", unlabeled_run, tmp_path / "a.train.beton", "--out", tmp_path / "a.npz")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        assert len(file["embeddings"] if "embeddings" in file else file[file.files[0]]) == 60
        assert "labels" not in file
    code, out, err = run(capsys, "verify", flat, "data.labels=none")
    assert code == 2  # 14 x 12 pixels
    assert "not square" in err
    code, out, err = run(capsys, "verify", flat, "data.labels=none", "data.image_size=12")
    assert (code, out) == (0, "train: 60 images, no labels, 12x14: 60\n")


MISTAKES = {
    "no labels to probe": ([], "its images have no labels (data.labels=none) to probe: name labeled data, such as"),
    "no folder": (["probe.transfer=[mnist:/nowhere]"], "probe.transfer=mnist:/nowhere: "),
    "one class": (["probe.transfer=image_folder:{one}"], "but all training images are of one, dark"),
    "too few images": (["probe.transfer=digits", "probe.knn.k=9999"], "probe.transfer=digits: probe.knn.k=9999"),
    "another size": (["data.source=digits", "data.image_size=9"], "data.image_size=9: the encoder of"),
    "corruptions of others": (
        ["data.source=digits", "probe.corruptions=fog"],
        "probe.corruptions needs the run's own data, but the settings name others (digits)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_before_any_probe(capsys, unlabeled_run, labeled, tmp_path, case):
    overrides, said = MISTAKES[case]
    shutil.copytree(labeled / "train/dark", tmp_path / "one/train/dark")
    shutil.copytree(labeled / "test/dark", tmp_path / "one/test/dark")
    code, out, err = run(capsys, "probe", unlabeled_run, *(text.format(one=tmp_path / "one") for text in overrides))
    assert (code, out) == (2, ""), err
    assert said in err.splitlines()[-1]
    assert not (unlabeled_run / "results.json").exists()


def test_a_missing_transfer_set_is_told_before_training(capsys, tmp_path):
    overrides = [*RGB, "probe.transfer=[digits, mnist:/nowhere]", f"run_dir={tmp_path / 'r'}"]
    code, out, err = run(capsys, "run", "default", *FAST, *overrides)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "probe.transfer=mnist:/nowhere: " in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({}, "holds no images"),
        ({"train/a.png": 1, "b.png": 1}, "b.png is next to"),
        ({"train/a.png": 1, "test/c.txt": 0}, "test holds no images"),
    ],
)
def test_a_folder_that_is_wrong_as_a_whole_is_named(tmp_path, layout, said):
    for name, is_image in layout.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if is_image:
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("")
    with pytest.raises(DataError, match=said):
        load_splits("image_folder", root=tmp_path, labels="none")


def test_folders_of_splits_are_read_at_any_depth(tmp_path):
    for name, count in (("train/x/y", 5), ("train", 2), ("val/z", 3), ("test", 4)):
        write_images(tmp_path / name, count, 0)
    splits = load_splits("image_folder", root=tmp_path, labels="none", image_size=8)
    assert [len(source) for source in (splits.train, splits.validation, splits.test)] == [7, 3, 4]
