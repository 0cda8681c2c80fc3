"""Speed and size of encoders from which channels were removed, beside the dense ones.

    python benchmarks/channel_pruning.py --encoder resnet18 --size 32 --size 224 > channels.csv

Encoders have random weights; the channels are chosen by L1 norm, the same share of every layer. Dense and pruned
encoder are called in turn in one process (`measure_latency`); times are medians.
"""

from __future__ import annotations

import argparse
import csv
import sys

import torch

from hpc_supcon.models import build_encoder
from hpc_supcon.pruning import (
    apply_plan,
    channel_plan,
    channel_scores,
    check_plan,
    count_macs,
    layer_widths,
    measure_latency,
    prunable,
    trace_channels,
)


def compare(name: str, size: int, rate: float, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each batch size."""
    torch.manual_seed(0)
    dense = build_encoder(name, image_size=size).eval()
    example = torch.zeros(2, 3, size, size)
    graph = trace_channels(dense, example)
    magnitudes = {key: weight.detach().abs() for key, weight in prunable(dense).items()}
    plan = channel_plan(graph, channel_scores(graph, magnitudes, relative=True), rate, "layer")
    state = dense.state_dict()
    small = build_encoder(name, image_size=size, channels=layer_widths(state, plan)).eval()
    small.load_state_dict(apply_plan(state, plan))
    check_plan(dense, small, plan, example)
    models = {"dense": dense.to(args.device), "pruned": small.to(args.device)}
    times = measure_latency(models, (3, size, size), batch_sizes=args.batch, seconds=args.seconds)
    macs = [count_macs(model, torch.zeros(1, 3, size, size, device=args.device))["macs"] for model in models.values()]
    parameters = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    rows = []
    for batch in args.batch:
        before, after = times["dense"][batch], times["pruned"][batch]
        row: dict[str, object] = {
            "encoder": name,
            "px": size,
            "rate": rate,
            "batch": batch,
            "parameters left": f"{parameters[1] / parameters[0]:.3f}",
            "MACs left": f"{macs[1] / macs[0]:.3f}",
        }
        if before is not None and after is not None:
            row |= {f"dense {key}": value for key, value in before.items()}
            row |= {f"pruned {key}": value for key, value in after.items()}
            row["times faster"] = f"{before['median_ms'] / after['median_ms']:.2f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", required=True)
    parser.add_argument("--size", action="append", type=int, required=True, help="side of the images in px")
    parser.add_argument("--rate", action="append", type=float, help="share of the channels to remove; 0.5")
    parser.add_argument("--batch", action="append", type=int, help="images per call; 1 and 64")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch size and model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.batch = args.batch or [1, 64]
    torch.set_num_threads(args.threads)
    rows = [
        row
        for name in args.encoder
        for size in args.size
        for rate in args.rate or [0.5]
        for row in compare(name, size, rate, args)
    ]
    writer = csv.DictWriter(sys.stdout, max(rows, key=len).keys())
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
