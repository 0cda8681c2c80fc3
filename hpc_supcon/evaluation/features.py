"""Features of a frozen encoder, computed once and kept."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..data import EvalOrder, EvalTransform, LoaderOptions, Source, build_loader
from ..runtime import Runtime


@torch.no_grad()
def extract(
    encoder: nn.Module,
    source: Source,
    transform: EvalTransform,
    runtime: Runtime,
    *,
    batch_size: int = 256,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's share of the source: (features float32 [n_r, feature_dim], labels int64 [n_r]).

    Every sample is on exactly one rank, in rank order (see EvalOrder). Always fp32 and in batches of one
    size, so that a feature does not depend on how many ranks share the work.
    """
    encoder.eval()
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
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in served.epoch(0):
            images, n = batch.images, len(batch.images)
            if n < batch_size:  # another batch size may take another kernel, and round otherwise
                images = torch.cat([images, images[-1:].expand(batch_size - n, -1, -1, -1)])
            features.append(encoder(transform(images)).float()[:n])
            labels.append(batch.labels)
    finally:
        served.close()
    if not features:
        width = cast(int, encoder.feature_dim)
        return torch.empty(0, width, device=runtime.device), torch.empty(0, dtype=torch.int64, device=runtime.device)
    return torch.cat(features), torch.cat(labels)
