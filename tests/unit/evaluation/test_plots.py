"""The picture of what a probe confuses."""

from __future__ import annotations

import os

import numpy as np
import pytest
from matplotlib.figure import Figure

from hpc_supcon.errors import RunFolderError
from hpc_supcon.evaluation import plots
from hpc_supcon.evaluation.plots import draw_confusion


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures: list[Figure] = []
    save = plots.save_figure

    def kept(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", kept)
    return figures


def texts(axis):
    return [text.get_text() for text in axis.texts]


@pytest.mark.parametrize("n", [2, 10, 30])
def test_a_matrix_has_the_number_of_images_of_every_pair_that_occurs(tmp_path, drawn, n):
    confusion = np.diag(np.arange(n) + 5)
    confusion[0, 1] = 3
    confusion[n - 1] = 0  # a class that the split lacks
    path = draw_confusion(tmp_path, "knn", confusion.tolist(), [f"class {k}" for k in range(n)])
    assert path == tmp_path / "plots/confusion-knn.png"
    axis = drawn[0].axes[0]
    found = {(round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in axis.texts}
    assert found == {(i, j): confusion[i, j] for i, j in zip(*confusion.nonzero(), strict=True)}
    (image,) = axis.images
    shares = np.asarray(image.get_array())
    assert shares[0, 1] == pytest.approx(3 / 8)
    assert shares[n - 1].max() == 0
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"class {k}" for k in range(n)]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true class", "prediction")


def test_of_many_classes_the_pairs_are_drawn_that_are_confused_most(tmp_path, drawn):
    confusion = np.diag(np.full(31, 50))
    wrong = {(k, 30 - k): k + 1 for k in range(31) if k != 15}
    for (i, j), count in wrong.items():
        confusion[i, j] = count
    draw_confusion(tmp_path, "linear", confusion.tolist(), [f"c{k}" for k in range(31)])
    axis = drawn[0].axes[0]
    most = sorted(wrong, key=wrong.get, reverse=True)[:20]
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"c{i} → c{j}" for i, j in most]
    assert [bar.get_width() for bar in axis.patches] == [wrong[pair] for pair in most]
    assert texts(axis)[0] == "31 (38%)"


def test_many_classes_that_are_all_right_are_said_to_be(tmp_path, drawn):
    draw_confusion(tmp_path, "linear", np.eye(40, dtype=int).tolist(), [str(k) for k in range(40)])
    assert texts(drawn[0].axes[0]) == ["every prediction is right"]


@pytest.mark.parametrize("n", [4, 40])
def test_names_are_drawn_as_they_are_and_two_long_ones_stay_different(tmp_path, drawn, n):
    names = [
        "$a_b$ \\frac{",
        os.fsdecode(b"caf\xe9"),
        "犬",
        "a very long name of class number 1",
        *map(str, range(n - 4)),
    ]
    confusion = np.ones((n, n), dtype=int)
    path = draw_confusion(tmp_path, "linear", confusion.tolist(), names)  # a warning would be an error
    assert path.stat().st_size > 5000
    labels = " ".join(label.get_text() for label in drawn[0].axes[0].get_yticklabels())
    assert "$a_b$ \\frac{" in labels
    if n == 4:
        assert r"caf\xe9" in labels
        assert "a very long …ss number 1" in labels


def test_a_disk_that_takes_no_picture_is_named(tmp_path):
    (tmp_path / "plots").write_text("")
    with pytest.raises(RunFolderError, match=r"confusion-knn\.png: not written"):
        draw_confusion(tmp_path, "knn", [[1, 0], [0, 1]], ["a", "b"])
