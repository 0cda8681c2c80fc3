"""Random choices of the loaders, each a pure function of (seed, epoch, index, view).

A generator with a state would tie a crop to the worker that drew it and to all draws before. Here the random
number IS a function of what it is for: Philox4x32-10, the counter-based generator of Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (SC 2011). Any loader, any number of workers and a resumed run agree.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .base import CropOptions

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

TRIES = 10
"""Boxes drawn before falling back to the center, as torchvision's RandomResizedCrop does."""
_BLOCKS = -(-(2 * TRIES + 2) // 4)  # of four random words each
_CROP, _REPLACE = 0, 1  # the last counter word keeps the purposes apart
_MASK, _32 = np.uint64(0xFFFF_FFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57)
_WEYL = 0x9E37_79B9, 0xBB67_AE85


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: counter uint64 [4, ...] and key, all values below 2^32 -> random words below 2^32 [4, ...]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits: exact in 64
        c0, c2 = (p1 >> _32) ^ c1 ^ np.uint64(k0), (p0 >> _32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack((c0, c1, c2, c3))


def _words(seed: int, epoch: int, index: Ints, within: Words, purpose: int) -> Words:
    """Random words [4, n, len(within)]; `within` numbers what is drawn for one image of one epoch."""
    shape = (len(index), len(within))
    counter = np.empty((4, *shape), dtype=np.uint64)
    counter[0] = index.astype(np.uint64)[:, None] & _MASK
    counter[1] = epoch % 2**32
    counter[2] = within
    counter[3] = purpose
    return philox(counter, (seed % 2**32, seed >> 32))


def crop_boxes(seed: int, epoch: int, index: Ints, heights: Ints, widths: Ints, crop: CropOptions) -> Ints:
    """int64 [B, V, 4]: top, left, height, width in pixels, distributed as RandomResizedCrop.get_params.

    index, heights, widths: int64 [B], which image of the source each is and its size. 0 <= seed < 2^64.
    """
    views = crop.views
    words = _words(seed, epoch, index, np.arange(views * _BLOCKS, dtype=np.uint64), _CROP)
    u = words.reshape(4, len(index), views, _BLOCKS).transpose(0, 3, 1, 2).reshape(4 * _BLOCKS, len(index), views)
    u = u * 2.0**-32
    H, W = heights[:, None], widths[:, None]
    area = (u[:TRIES] * (crop.scale[1] - crop.scale[0]) + crop.scale[0]) * (H * W)
    low, high = np.log(crop.ratio)
    aspect = np.exp(u[TRIES : 2 * TRIES] * (high - low) + low)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))

    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.argmax(axis=0)[None]  # the first that fits, 0 where none does
    w, h = np.take_along_axis(w, first, 0)[0], np.take_along_axis(h, first, 0)[0]
    fallback_h, fallback_w = _central(H, W, crop.ratio)
    none = ~fits.any(axis=0)
    h, w = np.where(none, fallback_h, h), np.where(none, fallback_w, w)
    top = np.where(none, (H - h) // 2, np.floor(u[2 * TRIES] * (H - h + 1)))
    left = np.where(none, (W - w) // 2, np.floor(u[2 * TRIES + 1] * (W - w + 1)))
    return np.stack((top, left, h, w), axis=-1).astype(np.int64)


def _central(H: Ints, W: Ints, ratio: tuple[float, float]) -> tuple[Ints, Ints]:
    """Height and width of the largest central box whose width / height is in range."""
    h = np.where(ratio[0] * H > W, np.rint(W / ratio[0]), H)
    w = np.where(ratio[1] * H < W, np.rint(H * ratio[1]), W)
    return np.maximum(h, 1).astype(np.int64), np.maximum(w, 1).astype(np.int64)


def central_boxes(heights: Ints, widths: Ints) -> Ints:
    """int64 [B, 1, 4]: the largest central square of each image."""
    side = np.minimum(heights, widths)
    return np.stack(((heights - side) // 2, (widths - side) // 2, side, side), axis=-1)[:, None]


def replacement(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """Which of n images stands in for image `index` in that epoch, at the given attempt to find a sound one."""
    word = _words(seed, epoch, np.array([index]), np.array([attempt], dtype=np.uint64), _REPLACE)[0, 0, 0]
    return int(word) * n >> 32
