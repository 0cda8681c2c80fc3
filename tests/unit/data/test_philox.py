"""Claims about the counter-based random numbers of the loaders."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_supcon.data.philox import philox, random_index, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123, the authors' own implementation
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_uniform_numbers_depend_on_seed_epoch_index_and_view_only():
    numbers = uniform(2**40 + 1, 0, np.arange(50), 3, 22)
    assert numbers.shape == (22, 50, 3)
    assert np.array_equal(numbers[:, [7, 31, 7], :2], uniform(2**40 + 1, 0, np.array([7, 31, 7]), 2, 22))
    others = uniform(1, 0, np.arange(50), 3, 22), uniform(2**40 + 1, 1, np.arange(50), 3, 22)
    assert all((other != numbers).mean() > 0.99 for other in others)
    assert len(np.unique(numbers)) == numbers.size


def test_uniform_numbers_are_uniform():
    numbers = uniform(0, 0, np.arange(2000), 2, 10).reshape(10, -1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(row, 10, (0, 1))[0] for row in numbers])
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)
    assert np.abs(np.corrcoef(numbers) - np.eye(10)).max() < 5 / np.sqrt(4000)


def test_random_indices_are_uniform_and_depend_on_epoch_and_attempt():
    chosen = [random_index(0, 0, i, 0, 50) for i in range(2000)]
    assert np.bincount(chosen, minlength=50).min() > 15
    assert chosen != [random_index(0, 1, i, 0, 50) for i in range(2000)]
    assert chosen != [random_index(0, 0, i, 1, 50) for i in range(2000)]
