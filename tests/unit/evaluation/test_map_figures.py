"""Figures of maps and neighbors: colors by class, names as they are, whole files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.errors import RunFolderError
from hpc_supcon.evaluation.map_figures import (
    COLORS,
    OTHERS,
    Classes,
    FittedMap,
    drawing,
    map_figure,
    overview_figure,
    save_figure,
)
from hpc_supcon.evaluation.neighbors import Neighbors, neighbors_figure

ODD_NAMES = ["$x^2$", "_hidden", "<b>&", "貓", "a\nb", "x" * 80]


def fitted(n, *, space="encoder", method="tsne", version="", seed=0):
    made = np.random.default_rng(seed).normal(size=(n, 2))
    return FittedMap(space, method, version, "after training" if space != "pixels" else "", made, 0.9)


def test_up_to_twenty_classes_each_have_their_own_color_and_marker():
    labels = np.arange(20).repeat(3)
    classes = Classes.of(labels, [str(i) for i in range(20)])
    assert len(set(classes.styles.values())) == 20
    assert [name for name, _, _ in classes.legend] == [str(i) for i in range(20)]
    assert Classes.of(labels[:30], ["a"] * 20).styles == {c: classes.styles[c] for c in range(10)}
    assert [color for _, color, _ in Classes.of(labels[:30], ["a"] * 20).legend] == list(COLORS)


def test_of_more_classes_a_few_are_named_and_the_legend_says_how_many_are_not():
    classes = Classes.of(np.arange(100).repeat(2), [f"class {i}" for i in range(100)])
    assert len(classes.styles) == 8
    assert classes.legend[0][0] == "class 0"
    assert classes.legend[-1][:2] == ("92 other classes", OTHERS)


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


def test_names_of_classes_are_shown_as_they_are(tmp_path):
    labels = np.arange(6).repeat(4)
    with drawing():
        figure = map_figure(fitted(24), Classes.of(labels, ODD_NAMES), "24 test images")
        save_figure(figure, tmp_path / "map")
        texts = texts_of(figure)
    assert {"$x^2$", "_hidden", "<b>&", "貓", "a\\nb", "x" * 23 + "…"} <= set(texts)
    with Image.open(tmp_path / "map.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50, "an empty plot"


def test_the_same_figure_gives_the_same_files(tmp_path):
    labels = np.arange(3).repeat(5)
    maps = [
        fitted(15, space="pixels"),
        fitted(15, version="initial", seed=1),
        fitted(15, seed=2),
        fitted(15, space="projection", version="initial", seed=3),
        fitted(15, space="projection", seed=4),
    ]
    for name in "ab":
        with drawing():
            figure = overview_figure(maps, Classes.of(labels, "xyz"), "a run", {"tsne": " (perplexity 5)"})
            save_figure(figure, tmp_path / name)
    assert len(figure.axes) == 5
    assert len({round(axis.get_position().width, 9) for axis in figure.axes}) == 1, "panels of one size"
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert {"t-SNE (perplexity 5)", "a run", "x", "y", "z"} <= set(texts_of(figure))


def test_points_that_are_all_one_are_drawn_and_said():
    one = FittedMap("encoder", "pca", "", "after training", np.zeros((9, 2)), 0.5, np.zeros(2))
    with drawing():
        figure = map_figure(one, Classes.of(np.zeros(9, dtype=int), ["only"]), "9 test images")
    assert "all points are the same" in texts_of(figure)


def test_a_figure_that_cannot_be_written_is_a_named_error(tmp_path):
    (tmp_path / "embeddings").write_text("a file where a folder should be")
    with drawing(), pytest.raises(RunFolderError, match=r"map\.png: not written"):
        save_figure(map_figure(fitted(9), Classes.of(np.zeros(9, dtype=int), ["a"]), ""), tmp_path / "embeddings/map")


@pytest.mark.parametrize("channels", [1, 3])
def test_neighbors_of_another_class_differ_by_more_than_their_color(channels):
    images = {i: torch.full((channels, 8, 8), 20 * i, dtype=torch.uint8) for i in range(5)}
    found = Neighbors(torch.tensor([0, 3]), torch.tensor([[1, 2], [4, 1]]), torch.tensor([[0.9, 0.8], [0.7, 0.6]]))
    with drawing():
        figure = neighbors_figure(images, found, torch.tensor([0, 0, 1, 1, 1]), ["cat", "_dog$"], "a title")
    frames = figure.axes[0].patches
    assert frames[1].get_linestyle() != frames[2].get_linestyle()
    texts = texts_of(figure)
    assert {"cat", "_dog$", "0.90", "× _dog$", "0.70", "× cat"} <= set(texts)
    assert "0.80" not in texts
