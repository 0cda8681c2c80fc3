"""Counter-based random numbers: each is a pure function of the seed, the epoch and the image it is drawn for.

With a stateful generator a number would depend on the worker that draws it and on every draw before. Here it is
computed from its coordinates by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), so every loader, any number of workers and a resumed run get the same number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..seeding import stream

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
WordArray = npt.NDArray[np.uint64]

_CROP, _INDEX = 0, 1  # the last word of the counter: numbers for different purposes are independent
_MASK, _32 = np.uint64(0xFFFF_FFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57)
_WEYL = 0x9E37_79B9, 0xBB67_AE85


def philox(counter: WordArray, key: tuple[int, int]) -> WordArray:
    """Philox4x32-10: counter uint64 [4, ...] and key, all values below 2^32 -> random words below 2^32 [4, ...]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits: exact in 64
        c0, c2 = (p1 >> _32) ^ c1 ^ np.uint64(k0), (p0 >> _32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack((c0, c1, c2, c3))


def uniform(seed: int, epoch: int, index: IntArray, views: int, count: int) -> FloatArray:
    """float64 [count, B, views], uniform in [0, 1): `count` numbers for each view of each image.

    index: int64 [B], which images. seed >= 0.
    """
    blocks = -(-count // 4)  # of four random words each
    words = _words(seed, epoch, index, np.arange(views * blocks, dtype=np.uint64), _CROP)
    per_view = words.reshape(4, len(index), views, blocks).transpose(0, 3, 1, 2)
    return per_view.reshape(4 * blocks, len(index), views)[:count] * 2.0**-32


def random_index(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """A random integer in 0..n-1 for image `index`, another one in every epoch and at every attempt."""
    word = _words(seed, epoch, np.array([index]), np.array([attempt], dtype=np.uint64), _INDEX)[0, 0, 0]
    return int(word) * n >> 32


def _words(seed: int, epoch: int, index: IntArray, within: WordArray, purpose: int) -> WordArray:
    """Random words [4, n, len(within)]; `within` numbers the draws for one image in one epoch."""
    shape = (len(index), len(within))
    counter = np.empty((4, *shape), dtype=np.uint64)
    counter[0] = index.astype(np.uint64)[:, None] & _MASK
    counter[1] = epoch % 2**32
    counter[2] = within
    counter[3] = purpose
    key = stream(seed, "crops")
    return philox(counter, (key % 2**32, key >> 32))
