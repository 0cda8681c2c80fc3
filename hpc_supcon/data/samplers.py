"""Samplers: which images share a batch. The random one is order.TrainOrder; those here look at the classes.

Like every order they are pure functions of (seed, epoch, rank, world_size): the global batches do not depend on
the number of ranks, and an epoch is a table whose rows are steps, so that a resumed run takes the remaining
rows. No image is twice in a global batch: a duplicate is a trivial positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, unknown_name
from .order import Order, TrainOrder, check_batch_size, check_shares, share_of

Indices = NDArray[np.int64]


class ClassBalanced:
    """Every global batch holds `images_per_class` images of each of `classes_per_batch` classes.

    Classes come equally often (their counts differ by at most one within an epoch), and a class serves all its
    images before one comes again. A batch lies class by class in turn (a b c a b c ...), so that each rank's
    part holds every class equally often too, where the ranks divide images_per_class.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: Sequence[str],
        batch_size: int,
        *,
        classes_per_batch: int,
        images_per_class: int,
    ) -> None:
        """labels: int64 [n], of the source; classes: their names. Classes without images are left out.

        Raises ConfigError when the two numbers do not make batch_size, when there are fewer classes than
        classes_per_batch, or when a class has fewer than images_per_class images; DataError as TrainOrder does.
        """
        self.n, self.batch_size = len(labels), batch_size
        self.classes_per_batch, self.images_per_class = classes_per_batch, images_per_class
        check_batch_size(batch_size, self.n)
        if classes_per_batch * images_per_class != batch_size:
            raise ConfigError(
                f"data.classes_per_batch={classes_per_batch} times data.images_per_class={images_per_class} is "
                f"{classes_per_batch * images_per_class}, not data.batch_size={batch_size}"
            )
        self._members = _members(labels)
        if classes_per_batch > len(self._members):
            raise ConfigError(
                f"data.classes_per_batch={classes_per_batch}, but the training set has images of only "
                f"{len(self._members)} classes"
            )
        smallest = min(self._members, key=len)
        if images_per_class > len(smallest):
            name = classes[int(labels[smallest[0]])]
            raise ConfigError(
                f"data.images_per_class={images_per_class}, but class {name!r} has only {len(smallest)} images, and "
                "none may be twice in a batch: lower it, or use data.sampler=long_tail_aware"
            )

    def steps(self, rank: int, world_size: int) -> int:
        """Steps per epoch, as many as of the random sampler. Raises ConfigError as TrainOrder does."""
        check_shares(self.batch_size, rank, world_size)
        return self.n // self.batch_size

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Tensor:
        """int64 [steps, batch_size // world_size]; see TrainOrder.epoch."""
        steps = self.steps(rank, world_size)
        generator = np.random.default_rng([seed, epoch])
        chosen = self._classes(steps, generator)
        batches = np.empty((steps, self.classes_per_batch, self.images_per_class), dtype=np.int64)
        for c, images in enumerate(self._members):
            visits = np.nonzero(chosen == c)
            sizes = np.full(len(visits[0]), self.images_per_class)
            batches[visits] = _serve(images, sizes, generator).reshape(-1, self.images_per_class)
        interleaved = batches.swapaxes(1, 2).reshape(steps, self.batch_size)
        return share_of(torch.from_numpy(interleaved), rank, world_size)

    def _classes(self, steps: int, generator: np.random.Generator) -> Indices:
        """[steps, classes_per_batch]: those that came least often so far, ties at random."""
        visits = np.zeros(len(self._members), dtype=np.int64)
        chosen = np.empty((steps, self.classes_per_batch), dtype=np.int64)
        for step in range(steps):
            ranking = np.lexsort((generator.random(len(visits)), visits))
            chosen[step] = ranking[: self.classes_per_batch]
            visits[chosen[step]] += 1
        return chosen


class LongTailAware:
    """Each place of a batch goes to class c with probability ~ n_c ** alpha, n_c its number of images.

    alpha=1 draws classes as often as they are in the data, alpha=0 all equally often. A class gets at most n_c
    places of a batch; what it cannot take goes to the others in the same proportions. A class serves all its
    images before one comes again, so an epoch repeats images of rare classes and leaves out some of frequent
    ones.
    """

    def __init__(self, labels: Tensor, batch_size: int, *, alpha: float) -> None:
        """labels: int64 [n], of the source; alpha: 0..1. Raises ConfigError for another alpha; as TrainOrder."""
        self.n, self.batch_size = len(labels), batch_size
        check_batch_size(batch_size, self.n)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"data.long_tail_alpha must be within 0..1, not {alpha}")
        self._members = _members(labels)
        self._sizes = np.array([len(images) for images in self._members])
        self._weights = self._sizes.astype(np.float64) ** alpha

    def steps(self, rank: int, world_size: int) -> int:
        """Steps per epoch, as many as of the random sampler. Raises ConfigError as TrainOrder does."""
        check_shares(self.batch_size, rank, world_size)
        return self.n // self.batch_size

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Tensor:
        """int64 [steps, batch_size // world_size]; see TrainOrder.epoch."""
        steps = self.steps(rank, world_size)
        generator = np.random.default_rng([seed, epoch])
        places = self._places(steps, generator)
        classes = np.tile(np.arange(len(self._sizes)), steps).repeat(places.ravel()).reshape(steps, self.batch_size)
        batches = np.empty_like(classes)
        for c, images in enumerate(self._members):
            batches[classes == c] = _serve(images, places[:, c], generator)
        # the places of a class lie side by side: shuffled, so that every rank gets a share of it
        return share_of(torch.from_numpy(generator.permuted(batches, axis=1)), rank, world_size)

    def _places(self, steps: int, generator: np.random.Generator) -> Indices:
        """[steps, classes]: images of each class in each batch; rows sum to batch_size."""
        places = generator.multinomial(self.batch_size, self._weights / self._weights.sum(), size=steps)
        for step in np.nonzero((places > self._sizes).any(axis=1))[0]:
            row = places[step]
            while excess := int((row - self._sizes).clip(min=0).sum()):
                row = row.clip(max=self._sizes)
                open_weights = self._weights * (row < self._sizes)
                row = row + generator.multinomial(excess, open_weights / open_weights.sum())
            places[step] = row
        return places


def _members(labels: Tensor) -> list[Indices]:
    """Indices of the images of each class that has any, in the order of the labels."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    return [images.numpy() for images in order.split(counts[counts > 0].tolist())]


def _serve(images: Indices, sizes: Indices, generator: np.random.Generator) -> Indices:
    """sum(sizes) of `images`, in portions of these sizes (each <= len(images)) without a duplicate in any.

    One permutation of all images after the other. A portion that spans two of them must not take from the
    second what it has from the first: its images of the second are chosen among the others.
    """
    n, ends = len(images), np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    served = np.empty(-(-total // n) * n, dtype=np.int64)
    for start in range(0, total, n):
        fresh = generator.permutation(images)
        if start:
            portion = np.searchsorted(ends, start, side="right")  # the one that holds position `start`
            end, begin = int(ends[portion]), int(ends[portion] - sizes[portion])
            free = np.nonzero(~np.isin(fresh, served[begin:start]))[0][: end - start]
            fresh = np.concatenate((fresh[free], np.delete(fresh, free)))
        served[start : start + n] = fresh
    return served[:total]


def _random(labels: Tensor, classes: Sequence[str], batch_size: int, **_: object) -> Order:
    return TrainOrder(len(labels), batch_size)


def _class_balanced(
    labels: Tensor,
    classes: Sequence[str],
    batch_size: int,
    *,
    classes_per_batch: int | None,
    images_per_class: int | None,
    **_: object,
) -> Order:
    if classes_per_batch is None or images_per_class is None:
        raise ConfigError(
            "data.sampler=class_balanced needs data.classes_per_batch and data.images_per_class, whose product is "
            f"data.batch_size={batch_size}"
        )
    return ClassBalanced(
        labels, classes, batch_size, classes_per_batch=classes_per_batch, images_per_class=images_per_class
    )


def _long_tail_aware(
    labels: Tensor, classes: Sequence[str], batch_size: int, *, long_tail_alpha: float, **_: object
) -> Order:
    return LongTailAware(labels, batch_size, alpha=long_tail_alpha)


SAMPLERS: dict[str, Callable[..., Order]] = {
    "random": _random,
    "class_balanced": _class_balanced,
    "long_tail_aware": _long_tail_aware,
}
"""`data.sampler` -> factory."""


def build_order(
    sampler: str,
    labels: Tensor,
    classes: Sequence[str],
    batch_size: int,
    *,
    classes_per_batch: int | None = None,
    images_per_class: int | None = None,
    long_tail_alpha: float = 0.5,
) -> Order:
    """The order of training called `sampler` over images of these labels (int64 [n]).

    Raises ConfigError for an unknown name, and what the order itself raises.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(unknown_name("data.sampler", sampler, SAMPLERS))
    return SAMPLERS[sampler](
        labels,
        classes,
        batch_size,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
        long_tail_alpha=long_tail_alpha,
    )
