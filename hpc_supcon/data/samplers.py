"""Samplers: which images share a batch. The random one is order.TrainOrder; those here depend on the classes.

Like every order they are pure functions of (seed, epoch, rank, world_size): the global batches do not depend on
the number of ranks, and an epoch is a table whose rows are steps, so that a resumed run takes the remaining
rows. No image occurs twice in a global batch: a duplicate is a trivial positive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..seeding import stream
from .order import Order, TrainOrder, check_batch_size, rank_part, training_steps
from .philox import IntArray
from .sources.stratify import indices_by_class


class _DependsOnClasses(ABC):
    """An order of which a subclass draws the global batches."""

    n: int
    batch_size: int

    def steps(self, rank: int, world_size: int) -> int:
        """Steps per epoch, as many as with the random sampler. Raises ConfigError as TrainOrder does."""
        return training_steps(self.n, self.batch_size, rank, world_size)

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Tensor:
        """int64 [steps, batch_size // world_size]; see TrainOrder.epoch."""
        steps = self.steps(rank, world_size)
        generator = np.random.default_rng(stream(seed, "order", epoch))
        return rank_part(torch.from_numpy(self._batches(steps, generator)), rank, world_size)

    @abstractmethod
    def _batches(self, steps: int, generator: np.random.Generator) -> IntArray:
        """int64 [steps, batch_size]: the global batches of an epoch."""


class ClassBalanced(_DependsOnClasses):
    """Every global batch has `images_per_class` images of each of `classes_per_batch` classes.

    Classes occur equally often (their counts differ by at most one within an epoch), and all images of a class
    are used before one is repeated. Classes alternate within a batch (a b c a b c ...), so that each rank's part
    has every class equally often too, where the number of ranks divides images_per_class.
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

        Raises ConfigError when the product of the two numbers is not batch_size, when there are fewer classes than
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
        self._by_class = [images.numpy() for images in indices_by_class(labels)]
        if classes_per_batch > len(self._by_class):
            raise ConfigError(
                f"data.classes_per_batch={classes_per_batch}, but the training set has images of only "
                f"{len(self._by_class)} classes"
            )
        smallest = min(self._by_class, key=len)
        if images_per_class > len(smallest):
            name = classes[int(labels[smallest[0]])]
            raise ConfigError(
                f"data.images_per_class={images_per_class}, but class {name!r} has only {len(smallest)} images, and "
                "none may occur twice in a batch: lower it, or use data.sampler=long_tail_aware"
            )

    def _batches(self, steps: int, generator: np.random.Generator) -> IntArray:
        chosen = self._classes(steps, generator)
        batches = np.empty((steps, self.classes_per_batch, self.images_per_class), dtype=np.int64)
        for c, images in enumerate(self._by_class):
            visits = np.nonzero(chosen == c)
            sizes = np.full(len(visits[0]), self.images_per_class)
            batches[visits] = _without_duplicates(images, sizes, generator).reshape(-1, self.images_per_class)
        return batches.swapaxes(1, 2).reshape(steps, self.batch_size)

    def _classes(self, steps: int, generator: np.random.Generator) -> IntArray:
        """[steps, classes_per_batch]: those that occurred least often so far, ties broken at random."""
        visits = np.zeros(len(self._by_class), dtype=np.int64)
        chosen = np.empty((steps, self.classes_per_batch), dtype=np.int64)
        for step in range(steps):
            ranking = np.lexsort((generator.random(len(visits)), visits))
            chosen[step] = ranking[: self.classes_per_batch]
            visits[chosen[step]] += 1
        return chosen


class LongTailAware(_DependsOnClasses):
    """Each image of a batch is of class c with probability proportional to n_c ** alpha, n_c its number of images.

    alpha=1 draws classes as often as they are in the data, alpha=0 all equally often. A batch has at most n_c
    images of class c; the rest is drawn from the other classes in the same proportions. All images of a class are
    used before one is repeated, so an epoch repeats images of rare classes and omits some of frequent ones.
    """

    def __init__(self, labels: Tensor, batch_size: int, *, alpha: float) -> None:
        """labels: int64 [n], of the source; alpha: 0..1. Raises ConfigError for another alpha, and as TrainOrder."""
        self.n, self.batch_size = len(labels), batch_size
        check_batch_size(batch_size, self.n)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"data.long_tail_alpha must be within 0..1, not {alpha}")
        self._by_class = [images.numpy() for images in indices_by_class(labels)]
        self._sizes = np.array([len(images) for images in self._by_class])
        self._weights = self._sizes.astype(np.float64) ** alpha

    def _batches(self, steps: int, generator: np.random.Generator) -> IntArray:
        counts = self._class_counts(steps, generator)
        classes = np.tile(np.arange(len(self._sizes)), steps).repeat(counts.ravel()).reshape(steps, self.batch_size)
        batches = np.empty_like(classes)
        for c, images in enumerate(self._by_class):
            batches[classes == c] = _without_duplicates(images, counts[:, c], generator)
        # the images of a class are adjacent: shuffled, so that every rank gets some of them
        return generator.permuted(batches, axis=1)

    def _class_counts(self, steps: int, generator: np.random.Generator) -> IntArray:
        """int64 [steps, classes]: images of each class in each batch; rows sum to batch_size."""
        counts = generator.multinomial(self.batch_size, self._weights / self._weights.sum(), size=steps)
        for step in np.nonzero((counts > self._sizes).any(axis=1))[0]:
            row = counts[step]
            while excess := int((row - self._sizes).clip(min=0).sum()):
                row = row.clip(max=self._sizes)
                open_weights = self._weights * (row < self._sizes)
                row = row + generator.multinomial(excess, open_weights / open_weights.sum())
            counts[step] = row
        return counts


def _without_duplicates(images: IntArray, sizes: IntArray, generator: np.random.Generator) -> IntArray:
    """sum(sizes) of `images`, in portions of these sizes (each <= len(images)) without a duplicate in any.

    Permutations of all images are concatenated. A portion that spans two of them must not get from the second an
    image that it has from the first: its images of the second are chosen among the others.
    """
    n, ends = len(images), np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.empty(-(-total // n) * n, dtype=np.int64)
    for start in range(0, total, n):
        permutation = generator.permutation(images)
        if start:
            portion = np.searchsorted(ends, start, side="right")  # the one that position `start` belongs to
            end, begin = int(ends[portion]), int(ends[portion] - sizes[portion])
            unused = np.nonzero(~np.isin(permutation, chosen[begin:start]))[0][: end - start]
            permutation = np.concatenate((permutation[unused], np.delete(permutation, unused)))
        chosen[start : start + n] = permutation
    return chosen[:total]


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
    """The training order of the sampler called `sampler`, over images with these labels (int64 [n]).

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
