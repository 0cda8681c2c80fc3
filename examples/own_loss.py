"""A loss of one's own, as for one process: with more ranks it gets the embeddings and labels of all of them.

hpc-supcon run quickstart loss.name=own_loss:NeighborhoodComponents loss.options.temperature=0.2
"""

import torch
from torch import nn


class NeighborhoodComponents(nn.Module):
    """Goldberger et al. 2004, equation 2: the share of a row's neighbors that are of its class."""

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings, labels):  # unit rows [images, views, D], int64 [images] -> the loss of the batch
        rows, labels = embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])
        own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        shares = (rows @ rows.T / self.temperature).masked_fill(own, float("-inf")).softmax(dim=1)
        same = (labels[:, None] == labels) & ~own
        return -(shares * same).sum(dim=1).clamp(min=1e-12).log().mean()
