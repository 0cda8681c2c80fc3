"""`run` and `probe` with every kind of probe: results, curves, saved probes, and mistakes of the user."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from hpc_supcon.cli.results import print_results
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import CheckpointCorrupt, RunFolderError
from hpc_supcon.evaluation import plots
from hpc_supcon.evaluation.embedding_scores import embedding_scores
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.evaluation.plots import draw_training_curves
from hpc_supcon.files import write_atomically
from hpc_supcon.run_folder import read_scores
from hpc_supcon.seeding import stream
from hpc_supcon.training.data import load_data
from tests.commands import run, succeed

FAST = [
    "report.embeddings=false",
    "data.source=synthetic", "data.synthetic={images: 90, classes: 4, channels: 1, image_size: 8}",
    "data.validation_fraction=0.2", "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16",
    "model.projection_dim=8", "train.epochs=2", "log.tensorboard=false", "log.every_steps=1", "runtime.threads=1",
    "probe.linear.epochs=3", "probe.linear.lrs=[1e-2, 1e-1]", "probe.softmax.iterations=20",
    "probe.logistic.iterations=20", "probe.logistic.classes=[3, 1]", "probe.mlp.epochs=3", "probe.mlp.hidden=[16, 8]",
    "probe.knn.k=3", "probe.finetune.epochs=2", "probe.finetune.batch_size=16",
]  # fmt: skip
KINDS = ["linear", "softmax", "logistic", "mlp", "knn", "finetune"]


def results_of(folder):
    return {r["probe"]: r for r in json.loads((folder / "results.json").read_text())["results"]}


def events_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every kind of probe."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    succeed("run", "default", *FAST, f"probe.kind=[{', '.join(KINDS)}]", f"run_dir={folder}")
    return folder


def test_every_kind_has_its_entry_in_the_order_of_the_configuration(whole):
    results = results_of(whole)
    assert list(results) == KINDS
    for kind, result in results.items():
        pixels = kind in ("softmax", "logistic")
        assert result["input"] == ("pixels" if pixels else "images" if kind == "finetune" else "features")
        assert (result["checkpoint"], result["encoder"]) == ((None, None) if pixels else ("step-8", "conv"))
        assert (result["seed"], result["data"]) == (0, "synthetic")
        assert set(result["test"]) == {"accuracy", "f1", "precision", "recall"}
    assert results["softmax"]["parameters"] == 64 * 4 + 4
    assert results["logistic"]["parameters"] == 64 + 1
    assert results["linear"]["parameters"] == results["finetune"]["parameters"] == 128 * 4 + 4
    assert results["knn"]["parameters"] == 0
    assert results["logistic"]["classes"] == 2
    assert results["softmax"]["iterations"] == 20


def test_every_evaluation_is_logged_and_plotted(whole):
    events = events_of(whole)
    for kind in KINDS:
        lines = [e for e in events if e["event"] == f"probe/{kind}"]
        if kind == "knn":
            assert not lines
            assert not (whole / "plots/loss-knn.png").exists()
            continue
        steps = [e["step"] for e in lines]
        assert steps == sorted(set(steps))
        assert steps[-1] == results_of(whole)[kind]["iterations"]
        for line in lines:
            names = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"}
            assert names <= {name for name, value in line.items() if isinstance(value, float)}
            assert 0 <= line["validation_accuracy"] <= 1
        kept = next(e for e in lines if e["step"] == results_of(whole)[kind]["chosen"]["iteration"])
        assert kept["validation_accuracy"] == pytest.approx(results_of(whole)[kind]["validation"]["accuracy"])
        for number in ("loss", "accuracy"):
            with Image.open(whole / f"plots/{number}-{kind}.png") as image:
                assert image.size[0] > 500
                assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "curves, not an empty page"
    assert (whole / "plots/loss-pretrain.png").stat().st_size > 5000
    assert not list((whole / "plots").glob(".*"))


def test_scores_of_the_embedding_are_those_of_the_test_split_s_features(whole):
    config = load_config(whole / "config.yaml")
    test = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits.test
    model, found = load_model(whole)
    model.eval()
    with torch.no_grad():
        features = model.encoder(EvalTransform(**found.state["normalization"])(test.stack()))
        spaces = {"encoder": features, "projection": model.heads["projection"](features)}
    written = read_scores(whole)["embedding"]
    assert list(written) == ["encoder", "projection"]
    for space, rows in spaces.items():
        assert written[space].pop("split") == "test"
        want = embedding_scores(rows, test.labels, seed=stream(config.seed, "probe"))
        assert written[space] == pytest.approx(want, rel=1e-4, abs=1e-6)
    logged = [event["space"] for event in events_of(whole) if event["event"] == "embedding"]
    assert logged == ["encoder", "projection"]


def test_another_data_set_is_told_from_the_run_s_own(capsys, tmp_path, whole):
    """Digits have one channel and 8x8 pixels as the run's images; the folder's are large and in color."""
    for split in ("train", "test"):
        (tmp_path / "noise" / split / "a").mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "noise" / split / "a" / f"{i}.png")
    sets = ["digits", f"image_folder:{tmp_path}/noise"]
    kinds = "probe.kind=[knn, logistic, linear]"
    code, _, err = run(capsys, "probe", str(whole), kinds, f"probe.ood=[{', '.join(sets)}]", "probe.embedding=false")
    assert code == 0, err
    found = read_scores(whole)["ood"]
    assert list(found) == sets
    for scores in found.values():
        assert list(scores) == ["knn", "mahalanobis", "max_softmax"]
        assert scores["max_softmax"].pop("probe") == "linear", "logistic knows two classes only"
        assert all(0 <= score <= 1 for detector in scores.values() for score in detector.values())
    assert [event["data"] for event in events_of(whole) if event["event"] == "ood"] == sets
    assert f"out of distribution ({sets[0]}), AUROC: knn" in err


def test_another_data_set_that_is_missing_is_told_before_training(capsys, tmp_path):
    code, _, err = run(capsys, "run", "default", *FAST, f"probe.ood=[mnist:{tmp_path}]", f"run_dir={tmp_path}/r")
    assert (code, err.count("\n")) == (2, 1 + err.count("loader:")), err
    assert f"probe.ood=mnist:{tmp_path}: mnist: {tmp_path}/MNIST/raw/train-images-idx3-ubyte does not exist" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_probe_reproduces_the_scores(whole, kind):
    fitted = load_probe(whole / "probes" / kind)
    config = load_config(whole / "config.yaml")
    test = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits.test
    x, labels = test.stack(), test.labels
    if fitted.input == "features":
        model, found = load_model(whole)
        with torch.no_grad():
            x = model.encoder.eval()(EvalTransform(**found.state["normalization"])(x))
    if kind == "logistic":
        assert fitted.classes == (test.classes[3], test.classes[1])
        rows = (labels == 3) | (labels == 1)
        x, labels = x[rows], (labels[rows] == 1).long()
    predicted = fitted.logits(x).argmax(dim=1)
    scores = results_of(whole)[kind]["test"]
    averaged = {"average": "macro", "zero_division": 0}
    assert scores == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "f1": f1_score(labels, predicted, **averaged),
            "precision": precision_score(labels, predicted, **averaged),
            "recall": recall_score(labels, predicted, **averaged),
        },
        abs=1e-6,
    )


def test_predictions_give_the_scores_of_both_files(whole):
    """scikit-learn's scores of the file's rows are those of scores.json and results.json."""
    results, scores = results_of(whole), read_scores(whole)["probes"]
    table = pq.read_table(whole / "predictions.parquet").to_pylist()
    assert set(scores) == set(results) == set(KINDS)
    assert {row["probe"] for row in table} == set(KINDS)
    for kind in KINDS:
        classes = scores[kind]["classes"]
        assert len(classes) == results[kind]["classes"]
        assert scores[kind]["checkpoint"] == results[kind]["checkpoint"]
        for split in ("validation", "test"):
            rows = [row for row in table if (row["probe"], row["split"]) == (kind, split)]
            index, labels, predicted = ([row[name] for row in rows] for name in ("index", "label", "prediction"))
            assert index == sorted(set(index))
            assert {row["path"] for row in rows} == {None}
            probabilities = np.array([row["probabilities"] for row in rows])
            split_scores = scores[kind]["splits"][split]
            assert probabilities.shape == (split_scores["samples"], len(classes))
            assert split_scores["accuracy"] == results[kind][split]["accuracy"] == accuracy_score(labels, predicted)
            matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))
            assert split_scores["confusion"] == matrix.tolist()
            of_label = probabilities[np.arange(len(labels)), labels].clip(np.finfo(float).eps)
            assert split_scores["nll"] == pytest.approx(-np.log(of_label).mean(), rel=1e-4)
            low, high = split_scores["accuracy_interval"]
            assert low <= split_scores["accuracy"] <= high
            assert "top5" not in split_scores


def test_training_scores_are_those_of_the_training_images(whole):
    config = load_config(whole / "config.yaml")
    splits = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits
    for kind in ("softmax", "finetune"):
        predicted = load_probe(whole / "probes" / kind).logits(splits.train.stack()).argmax(dim=1)
        got = results_of(whole)[kind]["train"]
        assert got["accuracy"] == pytest.approx(accuracy_score(splits.train.labels, predicted), abs=1e-6)
        assert read_scores(whole)["probes"][kind]["splits"]["train"]["samples"] == len(splits.train)


def test_training_scores_of_knn_leave_each_image_out_and_are_of_a_bounded_number(
    whole, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(whole, tmp_path / "r")
    config = load_config(folder / "config.yaml")
    train = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits.train
    normalize = EvalTransform(**load_model(folder)[1].state["normalization"])
    rows = torch.nn.functional.normalize(normalize(train.stack()).flatten(1).double(), dim=1)
    nearest = train.labels[(rows @ rows.T).fill_diagonal_(-2).argmax(dim=1)]
    n = len(train)
    for most, scored in {10_000: range(n), 20: [i for i in range(n) if i * 20 % n < 20]}.items():
        monkeypatch.setattr("hpc_supcon.evaluation.scored_probe.TRAINING_ROWS", most)
        pixels = ["probe.kind=knn", "probe.knn.input=pixels", "probe.knn.k=1"]
        assert run(capsys, "probe", str(folder), *pixels)[0] == 0
        scores = read_scores(folder)["probes"]["knn"]["splits"]["train"]
        assert scores["samples"] == len(scored)
        assert scores["accuracy"] == accuracy_score(train.labels[list(scored)], nearest[list(scored)])


def test_the_table_has_every_split_with_an_interval_in_80_columns(whole, capsys, monkeypatch):
    entries = list(results_of(whole).values())
    print_results(whole, entries)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 3 * len(KINDS)
    assert all(re.search(r"│ [01]\.\d{4} \[[01]\.\d{3}, [01]\.\d{3}\] │", row) for row in rows)
    assert max(map(len, lines[:-1])) <= 80
    # an interval of other numbers, as where scores.json could not be written, is not shown
    entries[0]["test"]["accuracy"] = 0.123
    print_results(whole, entries)
    assert "│ 0.1230                │" in capsys.readouterr().out


def test_without_pyarrow_everything_else_is_written_and_one_line_says_it(whole, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "r")
    before = (folder / "predictions.parquet").read_bytes()
    (folder / "scores.json").unlink()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, err = run(
        capsys, "probe", str(folder), "probe.kind=[knn, linear]", "probe.linear.lrs=[1e-2]", "probe.embedding=false"
    )
    assert code == 0, err
    assert err.count("\n") == 1
    assert "predictions.parquet is not written: it needs pyarrow" in err
    assert "pip install" in err
    assert list(read_scores(folder)["probes"]) == ["knn", "linear"]
    assert (folder / "predictions.parquet").read_bytes() == before


@pytest.mark.parametrize("name", ["scores.json", "predictions.parquet"])
def test_files_to_which_nothing_can_be_added_are_named_before_the_work(whole, tmp_path, capsys, name):
    folder = shutil.copytree(whole, tmp_path / "r")
    (folder / name).write_text("[")
    before = (folder / "results.json").read_bytes()
    code, out, err = run(capsys, "probe", str(folder), "probe.kind=knn")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{folder / name}: damaged, or not a file of" in err
    assert (folder / "results.json").read_bytes() == before


def test_scores_that_cannot_be_written_are_told_and_the_exit_code_is_1(whole, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "r")
    before = {name: (folder / name).read_bytes() for name in ("scores.json", "predictions.parquet")}

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, text):
        if path.name == "scores.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_atomically(path, text)

    monkeypatch.setattr("hpc_supcon.run_folder.write_atomically", write)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    code, out, err = run(
        capsys, "probe", str(folder), "probe.kind=[linear]", "probe.linear.iterations=1", "probe.embedding=false"
    )
    assert code == 1
    for name in before:
        assert err.splitlines().count(f"{folder / name}: not written: No space left on device") == 1, err
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert results_of(folder)["linear"]["iterations"] == 1
    assert f"{results_of(folder)['linear']['test']['accuracy']:.4f}" in out


def test_features_that_are_not_finite_are_named_in_place_of_scores(whole, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "r")
    before = (folder / "results.json").read_bytes()

    def infinite(self, x):
        return torch.full((len(x), 4), float("inf"))

    monkeypatch.setattr("hpc_supcon.evaluation.probes.base.FittedProbe.logits", infinite)
    code, _, err = run(capsys, "probe", str(folder), "probe.kind=knn")
    assert code == 3
    assert "knn probe, validation split: the logits of 18 images are NaN or Inf" in err
    assert err.count("\n") == 1
    assert (folder / "results.json").read_bytes() == before


def test_a_saved_probe_is_verified(capsys, whole, tmp_path):
    (file,) = (whole / "probes/mlp").rglob("probe.safetensors")
    payload = file.read_bytes()
    file.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(CheckpointCorrupt, match="bytes changed"):
        load_probe(whole / "probes/mlp")
    file.write_bytes(payload)
    with pytest.raises(CheckpointCorrupt, match="no fitted probe"):
        load_probe(whole / "probes/nothing")


def test_probing_again_replaces_only_its_own_entry(capsys, whole):
    before = results_of(whole)
    code, out, err = run(capsys, "probe", str(whole), "probe.kind=mlp", "probe.mlp.iterations=2")
    assert code == 0, err
    assert "mlp" in out
    after = results_of(whole)
    assert set(after) == set(before)
    assert after["mlp"]["iterations"] == 2
    assert all(after[kind] == before[kind] for kind in KINDS if kind != "mlp")
    assert len(list((whole / "probes/mlp").iterdir())) == 1


def test_a_probe_gives_the_same_results_alone_and_after_others(capsys, whole, tmp_path):
    arguments = ["run", "default", *FAST, "probe.kind=[finetune, linear]", f"run_dir={tmp_path}/r"]
    assert run(capsys, *arguments)[0] == 0
    want, got = results_of(whole), results_of(tmp_path / "r")
    for kind in ("finetune", "linear"):
        assert got[kind] | {"seconds": 0} == want[kind] | {"seconds": 0}


def test_probes_of_pixels_train_no_encoder(capsys, tmp_path):
    folder = tmp_path / "r"
    arguments = ["run", "default", *FAST, "probe.kind=[softmax, knn]", "probe.knn.input=pixels", f"run_dir={folder}"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert err.count("\n") == 1
    assert "no encoder is pre-trained" in err
    assert "synthetic, pixels" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", ".predictions.parquet.lock", ".results.json.lock", ".scores.json.lock", "config.yaml",
        "metrics.jsonl", "plots", "predictions.parquet", "probes", "report.html", "results.json", "scores.json",
    ]  # fmt: skip
    code, out, err = run(capsys, "probe", str(folder), "probe.kind=linear")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{folder}: no encoder in this run" in err
    code, _, err = run(capsys, "probe", str(folder), "probe.kind=logistic")
    assert code == 0, err
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "already used" in err
    code, _, err = run(capsys, *arguments, "--resume")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["probe.kind=knn", "probe.knn.k=73"], ["probe.knn.k=73", "72 images"]),
        (["probe.kind=logistic", "probe.logistic.classes=null"], ["choose two of the 4 classes"]),
        (
            ["probe.kind=logistic", "probe.logistic.classes=[class-1, klass-2]"],
            ["unknown class 'klass-2'", "did you mean 'class-2'"],
        ),
        (["probe.kind=logistic", "probe.logistic.classes=[0, 4]"], ["no class has index 4", "0 to 3"]),
        (["probe.kind=logistic", "probe.logistic.classes=[2, 2]"], ["same class"]),
        (["probe.kind=logistic", "probe.logistic.classes=[1]"], ["probe.logistic.classes"]),
        (["probe.kind=softmax", "data.validation_fraction=0"], ["probe.softmax.stopping.patience=50", "validation"]),
        (
            ["probe.kind=mlp", "data.validation_fraction=0", "probe.mlp.stopping.target=0.5"],
            ["probe.mlp.stopping.target=0.5", "validation"],
        ),
        (["probe.kind=mlp", "probe.mlp.batch_size=1"], ["probe.mlp.batch_norm", "two images"]),
        (
            ["probe.kind=softmax", "probe.softmax.evaluate_every=21"],
            ["probe.softmax.evaluate_every=21", "only 20 iterations"],
        ),
        (["probe.kind=finetune", "probe.finetune.batch_size=73"], ["probe.finetune.batch_size=73", "72 images"]),
        (
            ["probe.linear.input=images", "probe.linear.standardize=false", "probe.linear.batch_size=73"],
            ["probe.linear.batch_size=73", "72 images"],
        ),
        (["probe.linear.input=images"], ["probe.linear.standardize=false"]),
        (["probe.linear.stopping.monitor=f1"], ["probe.linear.stopping.monitor", "'f1'"]),
        (["probe.epochs=3"], ["probe.epochs", "did you mean"]),
    ],
)
def test_mistakes_exit_with_2_one_line_and_no_folder(capsys, tmp_path, arguments, parts):
    code, out, err = run(capsys, "run", "default", *FAST, *arguments, f"run_dir={tmp_path}/r")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in parts:
        assert part in err
    assert not (tmp_path / "r").exists()


def test_a_probe_that_diverges_is_an_error(capsys, tmp_path):
    steep = ["probe.softmax.lr=1e38", "probe.softmax.optimizer=sgd", "probe.softmax.clip_norm=null"]
    code, _, err = run(capsys, "run", "default", *FAST, "probe.kind=softmax", *steep, f"run_dir={tmp_path}/r")
    assert code == 3
    assert "NaN or Inf" in err


def test_training_curves_have_each_step_once_and_need_a_log(tmp_path):
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        draw_training_curves(tmp_path)
    lines = [{"event": "start", "step": 0}]
    lines += [{"event": "train", "step": s, "loss": 5 - s / 10} for s in (1, 2, 3, 2, 3, 4)]
    lines += [{"event": "validation", "step": s, "loss": 5.0, "accuracy": 0.5 + s / 10} for s in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = ["loss-pretrain.png", "accuracy-pretrain.png", "training.png"]
    assert [p.name for p in draw_training_curves(tmp_path)] == drawn
    assert (tmp_path / "plots/accuracy-pretrain.png").stat().st_size > 5000
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5, "lo')
    assert len(draw_training_curves(tmp_path)) == 3, "a torn line is passed over"


def test_the_panels_of_training_are_those_that_the_log_has_numbers_for(tmp_path, monkeypatch):
    lines = [{"event": "train", "step": s, "loss": 5.0, "lr": 0.1, "effective_rank": 3.0 + s} for s in (1, 2, 3, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {}

    def keep(figure, path):
        axes = [axis for axis in figure.axes if axis.get_visible() and axis.get_title()]
        shown[path.name] = {a.get_title(): [len(line.get_xdata()) for line in a.lines] for a in axes}
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    draw_training_curves(tmp_path)
    assert shown["training.png"] == {"loss": [3], "effective rank": [3], "learning rate": [3]}
