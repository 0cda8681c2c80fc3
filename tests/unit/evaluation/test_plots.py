"""Curves of a run: which files are drawn, and what is in them."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from hpc_supcon.config import load_config
from hpc_supcon.evaluation import plots
from hpc_supcon.evaluation.plots import draw_probe_curves, draw_training_curves
from hpc_supcon.stages import probe

HISTORY = [
    {"iteration": 10 * k, **{f"{split}_{number}": k + shift for split, shift in (("train", 0.0), ("validation", 0.5))
                             for number in ("loss", "accuracy")}}
    for k in (1, 2, 3)
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Path -> the figure that was saved there."""
    figures: dict[str, Figure] = {}
    save = plots.save_figure

    def kept(figure, path):
        figures[f"{path.parent.name}/{path.name}"] = figure
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", kept)
    return figures


def lines(figure):
    return {line.get_label(): list(line.get_xydata().T.tolist()) for line in figure.axes[0].get_lines()}


def write_log(folder, *events):
    text = "".join(json.dumps({"event": "train", **event}) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text)


def test_under_a_title_both_curves_of_a_probe_are_drawn_once_more(tmp_path, drawn):
    paths = draw_probe_curves(tmp_path, "linear", HISTORY, kept=20, title="z64 m=1.0")
    assert {str(path.relative_to(tmp_path)) for path in paths} == set(drawn) == {
        "plots/loss-linear.png", "plots/accuracy-linear.png", "images/loss-z64 m=1.0.png", "images/acc-z64 m=1.0.png",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)
    for name in ("images/loss-z64 m=1.0.png", "images/acc-z64 m=1.0.png"):
        found = lines(drawn[name])
        assert found["train"] == [[10, 20, 30], [1, 2, 3]]
        assert found["validation"] == [[10, 20, 30], [1.5, 2.5, 3.5]]
        assert "kept: iteration 20" in found


def test_without_a_title_there_are_no_images(tmp_path):
    draw_probe_curves(tmp_path, "linear", HISTORY)
    assert not (tmp_path / "images").exists()


def test_pre_training_without_accuracy_has_a_loss_under_its_title_alone(tmp_path, drawn):
    validation = {"event": "validation", "step": 4, "loss": 2.0}
    write_log(tmp_path, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}, validation)
    draw_training_curves(tmp_path, title="triplet")
    assert [name for name in drawn if name.startswith("images/")] == ["images/loss-triplet.png"]
    found = lines(drawn["images/loss-triplet.png"])
    assert (found["train"], found["validation"]) == ([[2, 4], [3, 1]], [[4], [2]])


def test_responses_are_a_figure_of_their_own_where_they_were_logged(tmp_path, drawn):
    write_log(tmp_path, {"step": 2, "loss": 3.0})
    draw_training_curves(tmp_path)
    assert "plots/response.png" not in drawn
    responses = [(2, 0.9, 0.5), (4, 0.8, 0.6), (4, 0.7, 0.4)]  # the last step was trained twice
    write_log(
        tmp_path,
        *({"step": step, "loss": 1.0, "response_positives": p, "response_negatives": n} for step, p, n in responses),
    )
    draw_training_curves(tmp_path)
    found = lines(drawn["plots/response.png"])
    assert found == {"positives": [[2, 4], [0.9, 0.7]], "negatives": [[2, 4], [0.5, 0.4]]}
    assert drawn["plots/response.png"].axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["probe.kind=softmax"], {"a"}),
        (["probe.kind=[softmax, logistic]"], {"a-softmax", "a-logistic"}),
        (["probe.kind=linear"], {"a-linear"}),  # "a" is the curve of pre-training
        (["probe.kind=[linear, softmax]"], {"a-linear", "a-softmax"}),
    ],
)
def test_no_curves_of_a_run_replace_others_under_its_title(settings, names):
    config = load_config("quickstart", ["report.title=a", *settings])
    assert {probe._title(config, kind) for kind in config.probe.kinds} == names
    assert probe._title(load_config("quickstart", settings), "linear") is None
