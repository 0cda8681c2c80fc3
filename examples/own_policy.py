"""A policy of one's own, after crop and flip: all that is random is drawn from the generator, so that runs resume.

hpc-supcon run quickstart augment.policy=own_policy:Cutout augment.options.size=3
"""

import torch


class Cutout:
    """DeVries and Taylor 2017, arXiv 1708.04552: a square of each view becomes gray."""

    def __init__(self, size=2):
        self.size = size

    def __call__(self, views, generator):  # uint8 [N, C, S, S] -> the same shape and type
        n, side = len(views), views.shape[-1]
        corner = torch.randint(side - self.size + 1, (2, n, 1), generator=generator, device=views.device)
        pixels = torch.arange(side, device=views.device)
        rows, columns = (pixels >= corner) & (pixels < corner + self.size)
        return views.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 128)
