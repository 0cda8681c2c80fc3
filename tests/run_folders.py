"""Run folders written by hand, with all that a page reads: results, scores, curves, maps and thumbnails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hpc_supcon import run_folder
from hpc_supcon.config import load_config
from hpc_supcon.pages.thumbnails import write_thumbnails

CLASSES = ["cat", "dog", "horse"]
HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\"quotes\" & 'more'", "=1+1", "\u2028[b]x",
]  # fmt: skip


def write_run(folder: Path, *overrides: str, accuracy=0.75, steps=20, classes=CLASSES, results=True, name="run"):
    """A finished run of `steps` steps; returns its folder."""
    config = load_config("quickstart", [f"run_dir={folder}", f"name={json.dumps(name)}", *overrides])
    run_folder.create(folder, config)
    start = {
        "event": "start", "step": 0, "time": 1000.0, "world_size": 2, "version": "0.1.0", "torch": "2.14.1",
        "python": "3.11.7", "parameters": 134176, "train_images": 1295, "steps_per_epoch": 2, "loader": "resident",
        "engine": "ddp", "command": "hpc-supcon run", "host": "node7", "device": "cpu", "threads": 1, "commit": "abc",
    }  # fmt: skip
    events = [start]
    for step in range(2, steps + 1, 2):
        train = {"event": "train", "step": step, "time": 1000.0 + step, "epoch": step // 2 - 1, "loss": 5 - step / 10}
        events.append(train | {"images_per_s": 512.0, "data_wait": 0.25, "lr": 0.1})
    events.append({"event": "validation", "step": steps, "time": 1000.5 + steps, "loss": 3.5, "accuracy": 0.7})
    events.append({"event": "end", "step": steps, "time": 1001.0 + steps, "seconds": steps + 1.0})
    write_events(folder, events)
    if results:
        numbers = dict.fromkeys(("f1", "precision", "recall"), accuracy - 0.01) | {"accuracy": accuracy}
        entry = {
            "stage": "probe", "probe": "linear", "encoder": "conv", "loss": "supcon_out",
            "checkpoint": f"step-{steps}", "seed": config.seed, "data": "digits", "seconds": 0.5,
            "validation": numbers, "test": numbers,
        }  # fmt: skip
        run_folder.add_result(folder, entry)
    write_state(folder, steps, classes)
    return folder


def write_events(folder: Path, events: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def write_state(folder: Path, step: int, classes, labels: str = "aa") -> None:
    """state.json of a checkpoint, as far as a page reads it: 100 test images."""
    (folder / f"checkpoints/step-{step}").mkdir(parents=True, exist_ok=True)
    test = {"counts": [60, 40], "labels": labels, "content": "bb", "names": "", "sizes": ""}
    state = {"classes": list(classes), "step": step, "data": {"classes": list(classes), "splits": {"test": test}}}
    (folder / f"checkpoints/step-{step}/state.json").write_text(json.dumps(state))


def write_scores(folder: Path, classes=CLASSES) -> None:
    """Everything that scores.json may hold."""
    n = len(classes)
    confusion = [[10 + i if i == j else (i + 2 * j) % 4 for j in range(n)] for i in range(n)]
    split = {
        "samples": sum(map(sum, confusion)), "accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "f1": 0.79,
        "f1_interval": [0.69, 0.88], "balanced_accuracy": 0.78, "ece": 0.02, "nll": 0.4,
        "per_class": {"f1": [0.5 + i / 10 for i in range(n)], "samples": [sum(row) for row in confusion]},
        "confusion": confusion,
    }  # fmt: skip
    run_folder.add_scores(folder, "probes", "linear", {"classes": list(classes), "splits": {"test": split}})
    run_folder.add_scores(folder, "embedding", "encoder", {"split": "test", "samples": 9, "nmi": 0.6, "ari": 0.5})
    run_folder.add_scores(folder, "ood", "noise", {"knn": {"auroc": 0.95, "fpr95": 0.1}})
    errors = {"contrast": [0.1, 0.2, 0.3, 0.4, 0.5]}
    run_folder.add_scores(folder, "corruptions", "linear", {"clean": 0.05, "errors": errors, "mce": 0.3})


def write_maps(
    folder: Path, classes=CLASSES, n=300, names=("encoder-tsne", "projection-pca", "initial-encoder-tsne")
):
    """Maps of n points in as many clusters as classes, and thumbnails: image i is gray i % 256."""
    rng = np.random.default_rng(0)
    out = folder / "embeddings"
    out.mkdir(exist_ok=True)
    index, labels = np.arange(n)[::-1].copy(), rng.integers(len(classes), size=n)
    for k, name in enumerate(names):
        angle = 2 * np.pi * labels / len(classes) + k
        points = 10 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(size=(n, 2))
        np.savez(out / f"{name}.npz", points=points, index=index, labels=labels, classes=np.array(list(classes)))
    shades = (np.arange(n) % 256).astype(np.uint8)
    write_thumbnails(out, np.broadcast_to(shades[:, None, None, None], (n, 1, 8, 8)).copy(), np.arange(n))
    return index, labels


def full_run(folder: Path, *overrides: str, classes=CLASSES, **options) -> Path:
    write_run(folder, *overrides, classes=classes, **options)
    write_scores(folder, classes)
    write_maps(folder, classes)
    return folder
