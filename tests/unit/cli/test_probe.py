"""`run` and `probe` with every kind of probe: results, curves, saved probes, and mistakes of the user."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from hpc_supcon import cli
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import CheckpointCorrupt, RunFolderError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.evaluation.plots import draw_training_curves
from hpc_supcon.training.data import load_data

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


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def results_of(folder):
    return {r["probe"]: r for r in json.loads((folder / "results.json").read_text())["results"]}


def events_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every kind of probe."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "default", *FAST, f"probe.kind=[{', '.join(KINDS)}]", f"run_dir={folder}"])
    assert not stopped.value.code
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
        ".lock", ".results.json.lock", "config.yaml", "metrics.jsonl", "plots", "probes", "results.json",
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
    assert [p.name for p in draw_training_curves(tmp_path)] == ["loss-pretrain.png", "accuracy-pretrain.png"]
    assert (tmp_path / "plots/accuracy-pretrain.png").stat().st_size > 5000
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5, "lo')
    assert len(draw_training_curves(tmp_path)) == 2, "a torn line is passed over"
