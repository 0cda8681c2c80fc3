"""Errors of fitted probes on corrupted test images: every corruption of `probe.corruptions` at every severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..data import SEVERITIES, EvalOrder, EvalTransform, Source, build_loader, corrupt, stratified_sample
from ..data.corruptions import BENCHMARK
from ..distributed.collectives import all_sum
from ..terminal import note, progress_bar, warn
from .features import in_chunks, select_classes
from .left_out import count_left_out
from .probes import FittedProbe, ProbeTask

BATCH = 256
"""Images at a time: always as many, because another number may take another kernel, which rounds differently."""
SEED = 0
"""Of the choice of images and of their noise. Not the run's: all runs are compared on the same corrupted images."""

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error of AlexNet over the severities of each corruption of ImageNet-C, as its authors publish it."""

Case = tuple[str, int] | None
"""(corruption, severity); None: the clean images."""


def corruption_errors(tasks: Sequence[ProbeTask], probes: Sequence[FittedProbe]) -> dict[str, dict[str, Any]]:
    """By kind of probe: {"images", "clean", "errors": {name: an error for each severity}, "mce"}. Collective.

    Errors are fractions in 0..1, of the test images or of `probe.corruption_images` of them; mce is their mean over
    corruptions and severities. On ImageNet's classes at 224 px, with all corruptions, "mce_alexnet" is the mean of
    each corruption's error over AlexNet's (Hendrycks & Dietterich 2019, section 4.1; without frost). From counts:
    equal on every rank and any number of ranks.

    tasks, probes: the same kinds in the same order. Images are read once, corrupted once for all probes and, where
    probes read features, encoded once. A probe of chosen classes of which no image is there has no entry. Raises
    CorruptSample where no image decodes, and what the loader raises.
    """
    task = tasks[0]
    names = task.config.probe.corruption_names
    cases: list[Case] = [None, *product(names, SEVERITIES)]
    source, chosen = _chosen_images(task)
    if task.runtime.is_main:
        note(f"corruptions: {len(names)} at {len(SEVERITIES)} severities of {len(source):,} test images")
    counts = torch.zeros(len(cases) + 1, len(probes), dtype=torch.int64, device=task.runtime.device)
    labels = _count(task, probes, cases, source, chosen, counts)
    count_left_out(source, labels)
    *hits, images = all_sum(counts).tolist()
    found = {}
    for k, probe in enumerate(probes):
        if images[k]:
            errors = [(images[k] - row[k]) / images[k] for row in hits]
            found[probe.kind] = _summary(names, images[k], errors, _is_imagenet(task, names))
        elif task.runtime.is_main:
            warn(f"probe.{probe.kind}: none of the {len(source)} images that are corrupted is of its classes")
    return found


def worst(scores: Mapping[str, Any]) -> tuple[str, float]:
    """(name, mean error over the severities) of the corruption with the highest one."""
    means = {name: fmean(errors) for name, errors in scores["errors"].items()}
    name = max(means, key=means.__getitem__)
    return name, means[name]


def _chosen_images(task: ProbeTask) -> tuple[Source, Tensor]:
    """(the test images to corrupt, int64 [n]: their indices in the test split)."""
    test, count = task.data.splits.labeled_test, task.config.probe.corruption_images
    if count is None or count == len(test):
        return test, torch.arange(len(test))
    chosen = stratified_sample(test.labels, count=count, seed=SEED)
    return test.subset(chosen), chosen


@torch.no_grad()
def _count(
    task: ProbeTask,
    probes: Sequence[FittedProbe],
    cases: Sequence[Case],
    source: Source,
    chosen: Tensor,
    counts: Tensor,
) -> Tensor:
    """Add this rank's correct predictions to `counts` [cases + 1, probes], and its images to the last row; returns
    the labels int64 [n_r] of its images."""
    runtime = task.runtime
    transform = EvalTransform(**task.description["normalization"]).to(runtime.device)
    encoder = task.encoder if any(probe.input == "features" for probe in probes) else None
    for module in [*probes, *([] if encoder is None else [encoder])]:
        module.eval()
    loader = build_loader(
        task.data.loader,
        source,
        EvalOrder(len(source), BATCH),
        seed=0,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=task.data.evaluation,
    )
    labels = [torch.empty(0, dtype=torch.int64, device=runtime.device)]
    with closing(loader), progress_bar() as bar:
        shown = bar.add_task("corruptions", total=loader.steps_per_epoch * len(cases), visible=runtime.is_main)
        for batch in loader.epoch(0):
            labels.append(batch.labels)
            index = chosen[batch.index.cpu()]
            for row, case in enumerate(cases if len(index) else []):
                images = batch.images if case is None else corrupt(batch.images, *case, index, seed=SEED)
                features = images
                if encoder is not None:
                    features = in_chunks(lambda x: encoder(transform(x)).float(), images, BATCH)
                for k, probe in enumerate(probes):
                    inputs = features if probe.input == "features" else images
                    correct = _correct(probe, inputs, batch.labels, task.classes)
                    counts[row, k] += correct.sum()
                    counts[-1, k] += len(correct) * (case is None)
                bar.advance(shown)
    return torch.cat(labels)


def _correct(probe: FittedProbe, inputs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tensor:
    """bool, for each image of one of the probe's classes."""
    if probe.classes != classes:
        inputs, labels = select_classes((inputs, labels), [classes.index(name) for name in probe.classes])
    return in_chunks(probe, inputs, BATCH).argmax(dim=1) == labels


def _summary(names: Sequence[str], images: int, errors: Sequence[float], is_imagenet: bool) -> dict[str, Any]:
    """errors: of the clean images, then of each corruption at each severity."""
    clean, *rest = errors
    by_name = {name: rest[k * len(SEVERITIES) : (k + 1) * len(SEVERITIES)] for k, name in enumerate(names)}
    summary = {"images": images, "clean": clean, "errors": by_name, "mce": fmean(rest)}
    if is_imagenet:
        summary["mce_alexnet"] = fmean(fmean(by_name[name]) / error for name, error in ALEXNET.items())
    return summary


def _is_imagenet(task: ProbeTask, names: Sequence[str]) -> bool:
    """Whether AlexNet's errors can be compared with: as far as the form of the data and the names say."""
    splits = task.data.splits
    form = (splits.image_size, splits.channels, len(splits.classes))
    return form == (224, 3, 1000) and set(BENCHMARK) <= set(names)
