"""Which names of timm.list_models() train here: each is built and trained for a step, or refused by name.

    python benchmarks/encoders.py --size 32 --size 224 --largest 30 > encoders.csv

A row for each name and size: trains (a step on random images, of models up to --largest million parameters), builds
(larger ones, on the meta device), refused (ConfigError, with its message) or BROKEN (anything else).
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
import warnings
from collections import Counter

import timm
import torch

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import build_encoder


def outcome(name: str, size: int, largest: float) -> tuple[str, str]:
    """(what became of it, the message of an error)"""
    try:
        with torch.device("meta"):
            encoder = build_encoder(name, image_size=size)
            parameters = sum(p.numel() for p in encoder.parameters())
            assert encoder(torch.empty(2, 3, size, size)).shape == (2, encoder.feature_dim)
        if parameters > largest * 1e6:
            return "builds", f"{parameters / 1e6:.0f} million parameters"
        encoder = build_encoder(name, image_size=size)
        left = [key for key, tensor in encoder.state_dict().items() if tensor.is_meta]
        assert not left, f"without values: {left[:3]}"
        features = encoder(torch.randn(2, 3, size, size))
        assert features.shape == (2, encoder.feature_dim)
        features.sum().backward()
    except ConfigError as error:
        return "refused", str(error)
    except Exception as error:  # what this looks for
        return "BROKEN", f"{type(error).__name__}: {error}"
    return "trains", f"{parameters / 1e6:.1f} million parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="by default all")
    parser.add_argument("--size", type=int, action="append", help="px; repeat for several")
    parser.add_argument("--largest", type=float, default=30.0, help="millions of parameters that are trained")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table, counts = csv.writer(sys.stdout), Counter[str]()
    for name in arguments.names or timm.list_models():
        for size in arguments.size or [32, 224]:
            began = time.perf_counter()
            found, message = outcome(name, size, arguments.largest)
            seconds = round(time.perf_counter() - began, 2)
            table.writerow([name, size, found, (message.splitlines() or [""])[0], seconds])
            sys.stdout.flush()
            counts[found] += 1
            gc.collect()
    sys.stderr.write(f"timm {timm.__version__}: {', '.join(f'{n} {what}' for what, n in counts.items())}\n")


if __name__ == "__main__":
    main()
