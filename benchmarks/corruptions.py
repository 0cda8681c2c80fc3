"""Images per second of each corruption, and a sheet of one image under all of them.

    python benchmarks/corruptions.py --size 32 --size 224 --threads 1 > corruptions.csv
    python benchmarks/corruptions.py --sheet sheet.png --size 224

The images are crops of a photograph that comes with scikit-learn; --gray makes them one-channel images. A rate is the
mean over the five severities; of each, the fastest of --repeats.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from hpc_supcon.data import CORRUPTIONS, SEVERITIES, corrupt


def crops(count: int, size: int, *, gray: bool) -> Tensor:
    """uint8 [count, C, size, size]."""
    photo = Image.fromarray(load_sample_image("china.jpg")).convert("L" if gray else "RGB")
    boxes = [(i * 7 % 240, i * 3 % 27, i * 7 % 240 + 400, i * 3 % 27 + 400) for i in range(count)]
    pixels = [np.array(photo.resize((size, size), Image.Resampling.BILINEAR, box=box)) for box in boxes]
    images = torch.from_numpy(np.stack(pixels))
    return images[:, None] if gray else images.permute(0, 3, 1, 2).contiguous()


def seconds(images: Tensor, name: str, repeats: int) -> float:
    """Seconds for one image, the mean over severities."""
    index = torch.arange(len(images))
    total = 0.0
    for severity in SEVERITIES:
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            corrupt(images, name, severity, index)
            taken.append(time.perf_counter() - began)
        total += min(taken)
    return total / len(SEVERITIES) / len(images)


def draw(path: str, size: int, *, gray: bool) -> None:
    """A row for each corruption, the clean image and the five severities in columns."""
    from matplotlib.figure import Figure

    image = crops(1, size, gray=gray)
    figure = Figure(figsize=(8, 1.3 * len(CORRUPTIONS)), layout="constrained")
    for axes, name in zip(figure.subplots(len(CORRUPTIONS), 1 + len(SEVERITIES)), CORRUPTIONS, strict=True):
        versions = [image, *(corrupt(image, name, severity, torch.tensor([0])) for severity in SEVERITIES)]
        for axis, version in zip(axes, versions, strict=True):
            axis.imshow(version[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_axis_off()
        axes[0].set_title(name, loc="left", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="px; repeat for several; by default 32")
    parser.add_argument("--images", type=int, default=256, help="of a batch at 32 px; fewer where they are larger")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gray", action="store_true")
    parser.add_argument("--sheet", metavar="PNG", help="draw one image in place of measuring")
    arguments = parser.parse_args()
    sizes = arguments.size or [32]
    if arguments.sheet:
        draw(arguments.sheet, sizes[0], gray=arguments.gray)
        return
    torch.set_num_threads(arguments.threads)
    table = csv.writer(sys.stdout)
    table.writerow(["corruption", *(f"images/s at {size} px" for size in sizes)])
    sets = [crops(max(8, arguments.images * 32**2 // size**2), size, gray=arguments.gray) for size in sizes]
    for name in CORRUPTIONS:
        table.writerow([name, *(round(1 / seconds(images, name, arguments.repeats)) for images in sets)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
