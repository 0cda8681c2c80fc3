"""The stage `embeddings`: what its maps show, of every kind of run, the same on any number of ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score

from hpc_supcon import checkpoint
from hpc_supcon.cli import main
from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, LoaderOptions
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation import maps, spaces
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.run_folder import read_config
from hpc_supcon.stages import pretrain as pretrain_stage
from hpc_supcon.stages.embeddings import draw_embeddings
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks
from tests.dist.test_left_out import Holes, images

ALONE = Runtime(Launch(), torch.device("cpu"))
COMMON = [
    "model.encoder=conv", "log.tensorboard=false", "log.progress=false", "runtime.threads=1", "report.points=60",
    "report.queries=3", "report.neighbors=4", "report.perplexity=8",
]  # fmt: skip
DIGITS = [
    *COMMON, "data.batch_size=256", "model.projection_hidden=64", "model.projection_dim=32", "train.epochs=24",
    "checkpoint.every_epochs=4", "checkpoint.keep=6", "augment.flip=0", "augment.crop_scale=[0.5, 1.0]",
    "report.checkpoints=1",
]  # fmt: skip
TINY = [
    *COMMON, "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 1, image_size: 8}",
    "data.batch_size=16", "model.projection_hidden=16", "model.projection_dim=8", "train.iterations=2",
    "report.points=20", "report.methods=[pca]",
]  # fmt: skip
BOTH = {"pixels", "initial-encoder", "encoder", "initial-projection", "projection"}
ENCODER = {"pixels", "initial-encoder", "encoder"}


def command(*arguments):
    """The exit code of a command, in this process."""
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code or 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings") / "run"
    assert command("pretrain", "default", *DIGITS, f"run_dir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert command("pretrain", "default", *TINY, f"run_dir={folder}") == 0
    return folder


def drawn(rank, world_size, folder):
    """The maps of one rank, and the points of the last weights."""
    config = read_config(folder, [f"run_dir={folder}"])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    data = load_data(config, runtime)
    return [drawn.name for drawn in draw_embeddings(folder, config, runtime, data)]


def arrays(folder):
    return {path.stem: dict(np.load(path)) for path in sorted((folder / "embeddings").glob("*.npz"))}


def versions_of(folder):
    """The sample's points for each of the weights, by name."""
    config = read_config(folder)
    data = load_data(config, ALONE)
    trained = spaces.load_trained(folder, config, ALONE, data)
    sample = maps.sample_of(data.splits.test.labels, 10_000, 0)
    read = spaces.read_versions(folder, config, ALONE, data, data.splits.test, sample, trained)
    return {version.name: version for version in read}, data.splits.test.labels


def test_two_ranks_draw_what_one_draws(trained, tmp_path):
    copies = [shutil.copytree(trained, tmp_path / str(ranks)) for ranks in (1, 2)]
    names = drawn(0, 1, copies[0])
    assert run_ranks(drawn, 2, copies[1]) == [names, []]
    one, two = map(arrays, copies)
    step = next(name for name in names if name.startswith("step-")).split("-encoder")[0]
    with_step = BOTH | {f"{step}-encoder", f"{step}-projection"}
    assert set(names) == set(one) == {f"{name}-{method}" for name in with_step for method in ("pca", "tsne")}
    for name, want in one.items():
        assert want.keys() == two[name].keys()
        for key, array in want.items():
            assert np.array_equal(array, two[name][key]), (name, key)
    found = [json.loads((copy / "embeddings/neighbors.json").read_text()) for copy in copies]
    assert found[0] == found[1]
    assert [len(query["neighbors"]) for query in found[0]["queries"]] == [4] * 3
    _check_files(copies[0], names)


def _check_files(folder, names):
    labels = load_data(read_config(folder), ALONE).splits.test.labels
    for name in names:
        saved = dict(np.load(folder / f"embeddings/{name}.npz", allow_pickle=False))
        assert saved["points"].shape == (60, 2)
        assert np.array_equal(labels[saved["index"]], saved["labels"])
        assert saved["classes"].tolist() == [str(i) for i in range(10)]
    for name in [*names, "overview", "neighbors"]:
        assert (folder / f"embeddings/{name}.svg").read_text().startswith("<?xml")
        with Image.open(folder / f"embeddings/{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 22)) > 50, "an empty plot"


def test_training_separates_the_classes_and_the_map_shows_where_they_are(trained):
    versions, labels = versions_of(trained)
    before, after = versions["initial"], versions[""]
    assert torch.equal(before.index, after.index)
    true = labels[after.index].numpy()
    scores = [silhouette_score(version.spaces["encoder"].numpy(), true) for version in (before, after)]
    assert scores[1] > scores[0] + 0.1
    points = maps.Points(after.spaces["encoder"])
    mapped = maps.fit_map("tsne", points, maps.FitOptions(0))
    assert trustworthiness(after.spaces["encoder"].numpy(), mapped, n_neighbors=12) >= 0.95
    assert silhouette_score(mapped, true) > silhouette_score(
        maps.fit_map("tsne", maps.Points(before.spaces["encoder"]), maps.FitOptions(0)), true
    )


def started_from(monkeypatch, folder, *settings):
    """The weights that training started from, of a run that then trains."""
    fit, weights = pretrain_stage.fit, {}

    def recorded(training, *arguments, **options):
        weights.update({name: tensor.clone() for name, tensor in training.state.model.state_dict().items()})
        return fit(training, *arguments, **options)

    monkeypatch.setattr(pretrain_stage, "fit", recorded)
    assert command("pretrain", "default", *TINY, "seed=5", *settings, f"run_dir={folder}") == 0
    return weights


@pytest.mark.parametrize("with_file", [False, True])
def test_the_weights_before_training_are_those_that_training_started_from(
    monkeypatch, tmp_path, tiny, capsys, with_file
):
    file, settings = tmp_path / "weights.pt", []
    if with_file:
        torch.save(load_model(tiny)[0].encoder.state_dict(), file)
        settings = [f"model.weights={file}"]
    want = started_from(monkeypatch, tmp_path / "run", *settings)
    config, (last, found) = read_config(tmp_path / "run"), load_model(tmp_path / "run")
    torch.manual_seed(99)  # the generators as some other work left them
    built = spaces._initial(tmp_path / "run", config, ALONE, found)
    assert built is not None
    assert built.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in built.state_dict().items())
    assert any(not torch.equal(tensor, want[name]) for name, tensor in last.state_dict().items())
    if with_file:
        torch.save({k: v * 2 for k, v in load_model(tiny)[0].encoder.state_dict().items()}, file)
        assert spaces._initial(tmp_path / "run", config, ALONE, found) is None
        assert "is another file than at that time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["loss.name=cross_entropy", "data.views=1"], ENCODER),
        (["loss.name=reconstruction", "model.out_dim=4", "data.views=1"], ENCODER),
        (["loss.name=simclr"], BOTH),
        (["loss.name=triplet", "report.split=train", "report.queries=0"], ENCODER),
        (["train.ema=0.9", "report.spaces=[projection]"], {"initial-projection", "projection"}),
        (["report.spaces=[pixels]"], {"pixels"}),
        (["probe.kind=softmax"], {"pixels"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_kind_of_run_has_the_maps_of_its_spaces(tmp_path, settings, names):
    quick = ["probe.softmax.iterations=1", "probe.softmax.evaluate_every=1"]
    stage = "run" if settings == ["probe.kind=softmax"] else "pretrain"
    assert command(stage, "default", *TINY, *settings, *quick, f"run_dir={tmp_path}/r") == 0
    if stage == "pretrain":
        assert command("embeddings", tmp_path / "r") == 0
    assert {name.removesuffix("-pca") for name in arrays(tmp_path / "r")} == names
    has_neighbors = "encoder" in names and "report.queries=0" not in settings
    assert (tmp_path / "r/embeddings/neighbors.png").exists() == has_neighbors


def test_a_pruned_run_has_no_weights_before_training_of_its_own(tiny, tmp_path, capsys):
    copy = shutil.copytree(tiny, tmp_path / "run")
    assert command("prune", copy, "probe.kind=knn", "probe.knn.k=3", f"run_dir={copy}") == 0
    capsys.readouterr()
    (pruned,) = (copy / "pruned").iterdir()
    assert command("embeddings", pruned) == 0
    assert {name.removesuffix("-pca") for name in arrays(pruned)} == {"pixels", "encoder", "projection"}
    assert "not drawn before training: a pruned run starts from another run's weights" in capsys.readouterr().err


def test_run_draws_at_its_end_and_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    run = ["run", "default", *TINY, "report.methods=[pca, tsne]", "probe.kind=knn", "probe.knn.k=3"]
    assert command(*run, f"run_dir={tmp_path}/r") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "not drawn" in line]
    assert told == ["embeddings: not drawn: report.methods: tsne needs the package openTSNE: pip install openTSNE"]
    assert {name.removesuffix("-pca") for name in arrays(tmp_path / "r")} == BOTH
    assert command("embeddings", tmp_path / "r") == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "pip install openTSNE" in err) == (1, True)


def test_what_cannot_be_drawn_is_one_line_that_says_what_to_do(tiny, tmp_path, capsys):
    copy = shutil.copytree(tiny, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    fewer = "data.synthetic={images: 12, classes: 3, channels: 1, image_size: 8}"
    for run, setting, code, told in (
        (copy, "seed=0", 2, "no checkpoint in it yet, so there are no embeddings: wait for the first one"),
        (tmp_path, "seed=0", 2, "no config.yaml in it"),
        (tiny, "report.methods=[pca, pca]", 2, "report.methods names one twice: pca, pca"),
        (tiny, "report.points=4", 2, "report.points"),
    ):
        assert command("embeddings", run, setting) == code
        err = capsys.readouterr().err
        assert (err.count("\n"), told in err) == (1, True), err
    assert command("run", "default", *TINY, fewer, "data.batch_size=4", "probe.kind=knn", "probe.knn.k=1",
                   f"run_dir={tmp_path}/few") == 0  # fmt: skip
    assert (
        "embeddings: not drawn: report.split=test has 3 images that decode, a map needs 5" in capsys.readouterr().err
    )
    assert command("embeddings", tmp_path / "few") == 2
    assert "has 3 images that decode, a map needs 5" in capsys.readouterr().err


class Damaged(Holes):
    """A part of it has the same damaged images."""

    def subset(self, indices):
        part = super().subset(indices)
        damaged = Damaged(part.stack(), part.labels, part.classes)
        damaged.holes = tuple(i for i, index in enumerate(indices.tolist()) if index in self.holes)
        return damaged


def test_images_that_do_not_decode_are_no_points():
    config = load_config("default", [*TINY, "report.spaces=[pixels]"])
    data = replace(load_data(config, ALONE), evaluation=LoaderOptions(on_corrupt="leave_out"))
    whole, sample = images(9), torch.tensor([1, 3, 4, 5, 6, 7, 8])
    damaged = Damaged(whole.stack(), whole.labels, whole.classes)
    damaged.holes = (0, 4, 7)
    (version,) = spaces.read_versions(Path(), config, ALONE, data, damaged, sample, None)
    assert version.index.tolist() == [1, 3, 5, 6, 8]
    want = images(9).stack()[version.index].flatten(1) / 255
    torch.testing.assert_close(version.spaces["pixels"], want)


def test_large_images_are_averaged_before_they_are_points():
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    source = ArraySource(x, torch.zeros(2, dtype=torch.int64), ("a",))
    made = spaces.Spaces(["pixels"], source, None)
    want = x.double().unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean(dim=(3, 5)).flatten(1) / 255
    assert made.feature_dim == 3 * 32 * 32
    torch.testing.assert_close(made(x).double(), want, rtol=1e-5, atol=1e-6)


def test_a_perplexity_too_large_for_the_points_is_lowered_and_told(tiny, tmp_path, capsys):
    copy = shutil.copytree(tiny, tmp_path / "run")
    settings = ["report.methods=[tsne]", "report.perplexity=30", "report.spaces=[pixels]", "report.points=10"]
    assert command("embeddings", copy, *settings, f"run_dir={copy}") == 0
    assert "report.perplexity=30 is lowered to 3: 10 points have too few neighbors" in capsys.readouterr().err


def test_features_that_are_nan_end_with_a_named_error(tiny, tmp_path, capsys):
    copy = shutil.copytree(tiny, tmp_path / "run")
    (path,) = (copy / "checkpoints").iterdir()
    found = checkpoint.load_checkpoint(path)
    broken = {
        name: torch.full_like(t, torch.nan) for name, t in found.tensors["model"].items() if t.is_floating_point()
    }
    shutil.rmtree(path)
    tensors = {**found.tensors, "model": found.tensors["model"] | broken}
    checkpoint.save_checkpoint(path.parent, 2, tensors, found.state, world_size=1, config_digest="")
    assert command("embeddings", copy, f"run_dir={copy}") == 3
    assert "NaN or Inf for" in capsys.readouterr().err
    assert not (copy / "embeddings").exists()


def test_a_disk_that_takes_no_maps_is_told_and_ends_with_code_1(tiny, tmp_path, capsys):
    copy = shutil.copytree(tiny, tmp_path / "run")
    Path(copy / "embeddings").write_text("no folder")
    assert command("embeddings", copy, f"run_dir={copy}") == 1
    err = capsys.readouterr().err
    assert "embeddings/pixels-pca.npz: not written" in err
    assert "embeddings/neighbors.json: not written" in err
    assert "not all results are in the run folder" in err
