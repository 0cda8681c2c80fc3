"""An image folder of mixed sizes, modes and file types out of CIFAR-10, as collections of the wild are.

    python benchmarks/mixed_images.py CIFAR10 MIXED
    hpc-supcon init MIXED --objective supcon --mirrored --minutes 10 -o mixed.yaml

500 training and 200 test images of each class, 28 to 96 pixels wide and high, one in twenty gray, JPEG or PNG.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

COUNTS = {"train": 500, "test": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="CIFAR-10 as an image folder: train/CLASS, test/CLASS")
    parser.add_argument("target", type=Path, help="a new folder")
    arguments = parser.parse_args()
    draw = random.Random(0)
    for split, count in COUNTS.items():
        for folder in sorted((arguments.source / split).iterdir()):
            target = arguments.target / split / folder.name
            target.mkdir(parents=True)
            for path in draw.sample(sorted(folder.iterdir()), count):
                size = draw.randint(28, 96), draw.randint(28, 96)
                mode, suffix = "L" if draw.random() < 0.05 else "RGB", draw.choice((".jpg", ".png"))
                with Image.open(path) as image:
                    image.convert(mode).resize(size).save(target / f"{path.stem}{suffix}", quality=95)


if __name__ == "__main__":
    main()
