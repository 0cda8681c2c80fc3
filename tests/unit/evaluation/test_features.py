"""Rows that probes read: preparation, chunks, the rows of some classes, and splits that are read once."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.data import ArraySource, EvalTransform, Splits
from hpc_supcon.evaluation.features import (
    SplitRows,
    build_prepare,
    evenly_spread,
    fit_standardization,
    in_chunks,
    rows_of_classes,
    select_classes,
)


def test_standardized_pixels_equal_the_plain_formula_and_constant_columns_stay_finite():
    images = torch.randint(256, (1500, 3, 4, 4), dtype=torch.uint8)
    images[:, 1, 2, 3] = 7
    normalization = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    prepare = build_prepare("pixels", 48, normalization, standardize=True)
    fit_standardization(prepare, images)
    flat = EvalTransform(**normalization)(images).flatten(1).double()
    std, mean = torch.std_mean(flat, dim=0, correction=0)
    std[1 * 16 + 2 * 4 + 3] = 1
    torch.testing.assert_close(prepare(images).double(), (flat - mean) / std, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 1023, 1025])
def test_chunks_are_padded_and_no_row_is_lost(n):
    x = torch.randn(n, 3)
    sizes = []

    def double(rows):
        sizes.append(len(rows))
        return 2 * rows

    assert torch.equal(in_chunks(double, x), 2 * x)
    assert set(sizes) == ({1024} if n else {0})


@pytest.mark.parametrize(("n", "count"), [(10, 3), (101, 100), (7, 7), (5, 9), (1, 1), (100_000, 10_000)])
def test_spread_rows_are_as_many_as_asked_and_evenly_apart(n, count):
    rows = torch.arange(n)
    kept = evenly_spread(rows, n, count).nonzero().flatten()
    assert len(kept) == min(n, count)
    assert set(kept.diff().tolist()) <= {n // count, n // count + 1}
    assert torch.equal(evenly_spread(rows[n // 3 :], n, count), evenly_spread(rows, n, count)[n // 3 :])


@pytest.mark.parametrize("classes", [(8, 3), (0,), (2, 5, 1), tuple(range(10))])
def test_selected_rows_are_labeled_by_the_position_of_their_class(classes):
    x, labels = torch.randn(200, 3), torch.randint(10, (200,))
    kept = [i for i, label in enumerate(labels.tolist()) if label in classes]
    assert rows_of_classes(labels, classes).nonzero().flatten().tolist() == kept
    selected, positions = select_classes((x, labels), classes)
    assert torch.equal(selected, x[kept])
    assert positions.tolist() == [classes.index(labels[i]) for i in kept]
    assert positions.dtype == torch.int64


def test_a_split_is_read_once_for_each_input_and_only_when_it_is_used():
    def source(n):
        return ArraySource(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("a", "b"))

    calls = []

    def read(source, input):
        calls.append((len(source), input))
        return source.stack(), source.labels

    rows = SplitRows(Splits(source(5), None, source(3)), read)
    assert calls == []
    for _ in range(2):
        assert len(rows.local("train", "pixels")[0]) == len(rows.gathered("train", "pixels")[0]) == 5
    assert len(rows.gathered("test", "features")[1]) == 3
    assert rows.local("validation", "pixels") is rows.gathered("validation", "pixels") is None
    assert calls == [(5, "pixels"), (3, "features")]
