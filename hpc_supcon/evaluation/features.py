"""What classifiers read: features of a frozen encoder or raw images, computed once and cached for all probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Batch, EvalOrder, EvalTransform, LoaderOptions, Source, Splits, build_loader
from ..distributed.collectives import gather_rows
from ..distributed.launch import Runtime


@torch.no_grad()
def extract(
    encoder: nn.Module,
    source: Source,
    transform: nn.Module,
    runtime: Runtime,
    *,
    batch_size: int = 256,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's share of the source: (features float32 [n_r, feature_dim], labels int64 [n_r]).

    transform: uint8 [B, C, H, W] -> what the encoder reads (EvalTransform).

    Every sample is on exactly one rank, in rank order (see EvalOrder). Always fp32 and in batches of one
    size, so that a feature does not depend on how many ranks share the work. Leaves the encoder in eval mode.
    """
    encoder.eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with _served(source, runtime, batch_size, loader, options) as batches:
        for batch in batches:
            images, n = batch.images, len(batch.images)
            if n < batch_size:  # another batch size may take another kernel, and round otherwise
                images = torch.cat([images, images[-1:].expand(batch_size - n, -1, -1, -1)])
            features.append(encoder(transform(images)).float()[:n])
            labels.append(batch.labels)
    if not features:
        width = cast(int, encoder.feature_dim)
        return torch.empty(0, width, device=runtime.device), torch.empty(0, dtype=torch.int64, device=runtime.device)
    return torch.cat(features), torch.cat(labels)


def read_images(
    source: Source,
    runtime: Runtime,
    *,
    batch_size: int = 256,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's share of the source as it is served: (images uint8 [n_r, C, H, W], labels int64 [n_r])."""
    with _served(source, runtime, batch_size, loader, options) as batches:
        pairs = [(batch.images, batch.labels) for batch in batches]
    if not pairs:
        images = torch.empty(0, source.channels, source.image_size, source.image_size, dtype=torch.uint8)
        return images.to(runtime.device), torch.empty(0, dtype=torch.int64, device=runtime.device)
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


@contextmanager
def _served(
    source: Source, runtime: Runtime, batch_size: int, loader: str, options: LoaderOptions | None
) -> Iterator[Iterator[Batch]]:
    served = build_loader(
        loader,
        source,
        EvalOrder(len(source), batch_size),
        seed=0,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=options,
    )
    try:
        yield served.epoch(0)
    finally:
        served.close()


Part = tuple[Tensor, Tensor]
"""(features float32 [n, D] or images uint8 [n, C, H, W], labels int64 [n])."""

CHUNK = 1024
"""Rows worked on at once outside training."""


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
    """Raw input -> what the head reads: `features` [n, width] and `pixels` (uint8 images) give float [n, width];
    `images` (uint8) gives normalized images for an encoder. standardize: ends with `Standardize`."""
    steps: list[nn.Module] = []
    if input != "features":
        steps.append(EvalTransform(**normalization))
    if input == "pixels":
        steps.append(nn.Flatten())
    return nn.Sequential(*steps, *[Standardize(width)] * standardize)


@torch.no_grad()
def fit_standardization(prepare: nn.Sequential, x: Tensor) -> None:
    """Set mean and standard deviation of `prepare`'s last part, a Standardize not fitted yet, to those of all of
    `x`, in float64, in chunks."""
    last = prepare[-1]
    assert isinstance(last, Standardize)

    def total(of: Callable[[Tensor], Tensor]) -> Tensor:
        return sum((of(prepare(rows).double()).sum(dim=0) for rows in x.split(CHUNK)), torch.zeros(1).to(last.mean))

    mean = total(lambda rows: rows) / len(x)
    std = (total(lambda rows: (rows - mean).square()) / len(x)).sqrt()
    last.mean.copy_(mean)
    # a column that is constant here must not blow up a pixel that is not constant elsewhere
    last.std.copy_(std.where(std > 1e-6, torch.ones_like(std)))


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` over rows of x [n, ...], CHUNK at a time; the last chunk is padded, so that a row's result does
    not depend on how many ranks share the rows."""
    parts = []
    for rows in x.split(CHUNK) if len(x) else [x]:
        missing = 0 if not len(rows) else CHUNK - len(rows)
        padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        parts.append(function(padded)[: len(rows)])
    return torch.cat(parts)


class Inputs:
    """This run's splits as features or pixels, each read once, when it is first asked for."""

    def __init__(self, splits: Splits, read: Callable[[Source, str], Part]) -> None:
        """read(source, input): this rank's share; collective over ranks only in that all read all splits."""
        self._splits, self._read = splits, read
        self._shares: dict[tuple[str, str], Part] = {}
        self._whole: dict[tuple[str, str], Part] = {}

    def share(self, split: str, input: str) -> Part | None:
        """This rank's rows; None for a validation split that the run has not."""
        source: Source | None = getattr(self._splits, split)
        if source is None:
            return None
        if (split, input) not in self._shares:
            self._shares[split, input] = self._read(source, input)
        return self._shares[split, input]

    def whole(self, split: str, input: str) -> Part | None:
        """All ranks' rows, in the source's order. Collective."""
        share = self.share(split, input)
        if share is None:
            return None
        if (split, input) not in self._whole:
            self._whole[split, input] = (gather_rows(share[0]), gather_rows(share[1]))
        return self._whole[split, input]
