"""What probes read: features of a frozen encoder or raw images, computed once and cached for all probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import EvalOrder, EvalTransform, Loader, LoaderOptions, Source, Splits, build_loader, pixel_dtype
from ..distributed.collectives import gather_rows
from ..distributed.launch import Runtime
from .left_out import count_left_out

LabeledRows = tuple[Tensor, Tensor]
"""(features float32 [n, D] or images uint8 or uint16 [n, C, H, W], labels int64 [n])."""
IndexedRows = tuple[Tensor, Tensor, Tensor]
"""The same and, int64 [n], which images of the source they are: some may be left out."""
CHUNK = 1024
"""Rows that go through a module at once outside training."""


def extract(
    encoder: nn.Module, source: Source, transform: nn.Module, runtime: Runtime, **serving: Any
) -> LabeledRows:
    """`extract_indexed` without the index."""
    return extract_indexed(encoder, source, transform, runtime, **serving)[:2]


@torch.no_grad()
def extract_indexed(
    encoder: nn.Module,
    source: Source,
    transform: nn.Module,
    runtime: Runtime,
    *,
    batch_size: int = 256,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> IndexedRows:
    """This rank's share of the source: (features float32 [n_r, feature_dim], labels int64 [n_r], index int64 [n_r]).

    transform: uint8 [B, C, H, W] -> what the encoder reads (EvalTransform).

    Every sample is on exactly one rank, in rank order (see EvalOrder), but for those that the loader leaves out (see
    `count_left_out`). Always in fp32 and in batches of one size, so
    that a feature does not depend on the number of ranks. Leaves the encoder in eval mode.
    """
    encoder.eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    index: list[Tensor] = []
    with closing(_build_loader(source, runtime, batch_size, loader, options)) as opened:
        for batch in opened.epoch(0):
            images, n = batch.images, len(batch.images)
            if n == 0:  # none of them decodes
                continue
            if n < batch_size:  # another batch size may take another kernel, which rounds differently
                images = torch.cat([images, images[-1:].expand(batch_size - n, -1, -1, -1)])
            features.append(encoder(transform(images)).float()[:n])
            labels.append(batch.labels)
            index.append(batch.index)
    if not features:
        width = cast(int, encoder.feature_dim)
        none = torch.empty(0, dtype=torch.int64, device=runtime.device)
        return torch.empty(0, width, device=runtime.device), none, none
    return torch.cat(features), torch.cat(labels), torch.cat(index).to(runtime.device)


def read_indexed(
    source: Source,
    runtime: Runtime,
    *,
    batch_size: int = 256,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> IndexedRows:
    """This rank's share of the source as its loader serves it: (images [n_r, C, H, W], labels int64 [n_r],
    index int64 [n_r])."""
    with closing(_build_loader(source, runtime, batch_size, loader, options)) as opened:
        batches = list(opened.epoch(0))
    if not batches:
        images = torch.empty(0, source.channels, source.image_size, source.image_size, dtype=pixel_dtype(source))
        none = torch.empty(0, dtype=torch.int64, device=runtime.device)
        return images.to(runtime.device), none, none
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.index for batch in batches]),
    )


def _build_loader(
    source: Source, runtime: Runtime, batch_size: int, loader: str, options: LoaderOptions | None
) -> Loader:
    return build_loader(
        loader,
        source,
        EvalOrder(len(source), batch_size),
        seed=0,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=options,
    )


def rows_of_classes(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """bool [n]: which of `labels` int64 [n] are one of `classes`."""
    return torch.isin(labels, labels.new_tensor(classes))


def evenly_spread(rows: Tensor, n: int, count: int) -> Tensor:
    """bool [k]: which of `rows` int64 [k], of n rows numbered from 0, are among `count` evenly spread ones; all are
    where count >= n."""
    return rows * count % n < count


def select_classes(rows: LabeledRows, classes: Sequence[int]) -> LabeledRows:
    """The rows whose label is one of `classes`, labeled by their position in `classes`."""
    x, labels = rows
    selected = rows_of_classes(labels, classes)
    position = labels.new_zeros(max(classes) + 1)
    position[list(classes)] = torch.arange(len(classes), device=labels.device)
    return x[selected], position[labels[selected]]


class Standardize(nn.Module):
    """[n, D] -> (x - mean) / std per column; zeros and ones until `fit`."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def build_prepare(input: str, width: int, normalization: Mapping[str, Any], *, standardize: bool) -> nn.Sequential:
    """Raw input -> what encoder or head read: `features` [n, width] and `pixels` (uint8 images) become float
    [n, width], `images` (uint8) become normalized images. standardize: a `Standardize` is the last step."""
    steps: list[nn.Module] = []
    if input != "features":
        steps.append(EvalTransform(**normalization))
    if input == "pixels":
        steps.append(nn.Flatten())
    return nn.Sequential(*steps, *[Standardize(width)] * standardize)


@torch.no_grad()
def fit_standardization(prepare: nn.Sequential, x: Tensor) -> None:
    """Set mean and standard deviation of `prepare`'s last step, a Standardize not fitted yet, to those of all rows of
    `x`, computed in float64, in chunks."""
    last = prepare[-1]
    assert isinstance(last, Standardize)

    def total(of: Callable[[Tensor], Tensor]) -> Tensor:
        return sum((of(prepare(rows).double()).sum(dim=0) for rows in x.split(CHUNK)), torch.zeros(1).to(last.mean))

    mean = total(lambda rows: rows) / len(x)
    std = (total(lambda rows: (rows - mean).square()) / len(x)).sqrt()
    last.mean.copy_(mean)
    # not divided by almost zero: a pixel that is constant in these images may not be constant in others
    last.std.copy_(std.where(std > 1e-6, torch.ones_like(std)))


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, size: int = CHUNK) -> Tensor:
    """`function` of the rows of x [n, ...], `size` at a time. The last chunk is padded, so that a row's result does
    not depend on the number of ranks."""
    parts = []
    for rows in x.split(size) if len(x) else [x]:
        missing = 0 if not len(rows) else size - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        parts.append(function(padded)[: len(rows)])
    return torch.cat(parts)


class SplitRows:
    """The splits of a run as features or pixels, each computed at its first use and kept for all probes.

    `left_out`: for each split that was read, how many of its images do not decode and have no row.
    """

    def __init__(self, splits: Splits, read: Callable[[Source, str], IndexedRows]) -> None:
        """read(source, input) -> this rank's rows. Ranks must read the same splits: each first use is collective."""
        self._splits, self._read = splits, read
        self.left_out: dict[str, int] = {}
        self._local: dict[tuple[str, str], IndexedRows] = {}
        self._gathered: dict[tuple[str, str], LabeledRows] = {}

    def local(self, split: str, input: str) -> LabeledRows | None:
        """This rank's rows; None for a validation split that the run does not have. Collective.

        Raises CorruptSample where no image of the split decodes.
        """
        rows = self.indexed(split, input)
        return None if rows is None else rows[:2]

    def indexed(self, split: str, input: str) -> IndexedRows | None:
        """As `local`, with the index of each row in the split's source. Collective."""
        source: Source | None = getattr(self._splits, split)
        if source is None:
            return None
        if (split, input) not in self._local:
            rows = self._read(source, input)
            self.left_out[split] = count_left_out(source, rows[1])
            self._local[split, input] = rows
        return self._local[split, input]

    def gathered(self, split: str, input: str) -> LabeledRows | None:
        """All ranks' rows, in the source's order. Collective."""
        local = self.local(split, input)
        if local is None:
            return None
        if (split, input) not in self._gathered:
            self._gathered[split, input] = (gather_rows(local[0]), gather_rows(local[1]))
        return self._gathered[split, input]
