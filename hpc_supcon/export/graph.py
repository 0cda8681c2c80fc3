"""A part as one graph for other programs: pixels in 0..1 come in, and no branch depends on their values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.neighbours import Neighbours
from .parts import Part


class PixelGraph(nn.Module):
    """Images float32 [N, C, S, S] in 0..1 -> the part's output: the normalisation is inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, part: Part) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(part.description["normalisation"][name]).view(-1, 1, 1))
        module = part.module
        if part.name == "classifier":
            assert isinstance(module, nn.Sequential)
            module = nn.Sequential(*[Votes(m) if isinstance(m, Neighbours) else m for m in module])
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - self.mean) / self.std)


class Votes(nn.Module):
    """`Neighbours` without its tiles and without its branch on equal similarities: of training rows exactly as
    similar as the k-th, any may vote. Holds [N, training rows] similarities."""

    bank: Tensor
    votes: Tensor

    def __init__(self, head: Neighbours) -> None:
        super().__init__()
        self.k, self.temperature = head.k, head.temperature
        self.register_buffer("bank", head.bank)
        self.register_buffer("votes", F.one_hot(head.labels, head.classes).float())

    def forward(self, features: Tensor) -> Tensor:
        similarities, rows = (F.normalize(features, dim=1) @ self.bank.T).topk(self.k, dim=1)
        weights = ((similarities - similarities[:, :1]) / self.temperature).exp()
        votes = (weights[:, :, None] * self.votes[rows]).sum(dim=1)
        return votes.clamp(min=torch.finfo(torch.float32).tiny).log()
