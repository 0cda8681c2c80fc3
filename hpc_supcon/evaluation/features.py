"""What classifiers read, computed once and kept: features of a frozen encoder, or the images themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..data import Batch, EvalOrder, LoaderOptions, Source, build_loader
from ..runtime import Runtime


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
