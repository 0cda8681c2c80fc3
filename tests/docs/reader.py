"""The things of a reader's own that the documentation names, made real: data, run folders, a checkout.

The words are those of docs/index.md, "Words in capitals".
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torchvision.datasets.mnist import read_image_file, read_label_file

from hpc_supcon.models import build_encoder
from tests.docs.pages import ROOT
from tests.docs.shell import Server, typed

WORDS = {"CONFIG": "quickstart"}
"""Words that are replaced. All others are names of files and folders that are there."""
LINKED = ("launch", "slurm")
TRAINED = "hpc-supcon run quickstart run_dir=RUN_DIR; hpc-supcon run quickstart seed=1 run_dir=OTHER_RUN"
CLASSES = ("airplane", "automobile", "bird")
COUNTS = {"train": 8, "test": 4}
"""Images of each class."""
SIDE = 20


def things(folder: Path, server: Server, *, runs: bool = True) -> Path:
    """A folder with all of them, or all but the run folders."""
    folder.mkdir()
    for number, (split, label, image) in enumerate(photographs()):
        place = folder / "FOLDER" / split / label
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.jpg")
    (folder / "FLAT").mkdir()
    for i, path in enumerate(sorted((folder / "FOLDER/train").rglob("*.jpg"))):
        shutil.copy(path, folder / "FLAT" / f"{i}.jpg")
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(folder / "ROOT" / name / "raw")
    encoder = build_encoder("resnet18", in_channels=3, image_size=32, stem="small")
    save_file(encoder.state_dict(), folder / "NAME-encoder.safetensors")
    if runs:
        done = typed(TRAINED, server, folder)
        assert done.returncode == 0, done.stderr
    return folder


def desk(folder: Path, own: Path, server: Server) -> Path:
    """The folder that a page is typed in: a reader's own things, and what a checkout has that pages name."""
    shutil.copytree(own, folder)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(server.bin)
    return folder


def photographs() -> Iterator[tuple[str, str, Image.Image]]:
    """(split, class, image): of CIFAR-10 where HPC_SUPCON_TEST_DATA has it, else of digits in color."""
    real = Path(os.environ.get("HPC_SUPCON_TEST_DATA", "/nonexistent")) / "cifar10"
    digits = load_digits()
    for split, count in COUNTS.items():
        for number, label in enumerate(CLASSES):
            if real.is_dir():
                found = [
                    Image.open(path).resize((SIDE, SIDE))
                    for path in sorted((real / split / label).glob("*.jpg"))[:count]
                ]
            else:
                of_class = digits.images[digits.target == number]
                first = 0 if split == "train" else COUNTS["train"]
                tints = np.array([(16, 12, 8), (8, 16, 12), (12, 8, 16)])
                found = [
                    Image.fromarray((image[..., None] * tints[i % 3] * 0.99).astype(np.uint8)).resize((SIDE, SIDE))
                    for i, image in enumerate(of_class[first : first + count])
                ]
            for image in found:
                yield split, label, image


def write_mnist(raw: Path) -> None:
    """Four idx files, of 30 and 20 images: of MNIST where HPC_SUPCON_TEST_DATA has it, else of digits."""
    raw.mkdir(parents=True)
    real = Path(os.environ.get("HPC_SUPCON_TEST_DATA", "/nonexistent")) / "MNIST/raw"
    digits = load_digits()
    first = 0
    for part, count in (("train", 30), ("t10k", 20)):
        if real.is_dir():
            pixels = read_image_file(str(real / f"{part}-images-idx3-ubyte"))[:count].numpy()
            labels = read_label_file(str(real / f"{part}-labels-idx1-ubyte"))[:count].numpy()
        else:
            chosen = slice(first, first + count)
            small = np.kron(digits.images[chosen] * 15, np.ones((3, 3)))
            pixels, labels = np.pad(small, ((0, 0), (2, 2), (2, 2))), digits.target[chosen]
        first += count
        images = struct.pack(">4i", 0x803, count, 28, 28) + pixels.astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        classes = struct.pack(">2i", 0x801, count) + labels.astype(np.uint8).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(classes)
