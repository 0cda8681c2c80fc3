"""Image folders of JPEGs for benchmarks, made without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_large_set(folder: Path, images: int = 1024, side: int = 256) -> Path:
    """Write an image folder of random JPEGs of side x side px, without a download; returns `folder`.

    They have 3.3 bits per pixel, as photographs of this size at quality 90 to 95, so that decoding costs the same.
    """
    rng = np.random.default_rng(0)
    for i in range(images):
        coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 8, (side, side, 3))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        for split in ("train", "test") if i < 8 else ("train",):
            target = folder / split / f"class{i % 4}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target / f"{i}.jpg", quality=90)
    return folder
