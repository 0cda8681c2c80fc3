"""Options of benchmarks that train on MNIST and CIFAR-10."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser_of_real_data(description: str | None, runs: str) -> argparse.ArgumentParser:
    """runs: the folder of the runs, where none is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="folder of MNIST in torchvision's layout")
    parser.add_argument("--cifar10", help="CIFAR-10 as an image folder: train/CLASS, test/CLASS")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where the runs are kept")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; a .md beside it has the tables")
    return parser
