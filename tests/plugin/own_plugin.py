"""A package that registers a part of every kind by entry points, and imports nothing of hpc_supcon."""

from __future__ import annotations

import torch
from torch import nn


def shapes(root, images=120, size=12):
    """A source: a bright third of the image tells the class."""

    def split(n):
        labels = torch.arange(n) % 3
        images = torch.full((n, 1, size, size), 60, dtype=torch.uint8)
        for i, c in enumerate(labels.tolist()):
            images[i, :, c * size // 3 : (c + 1) * size // 3] = 150 + i % 50
        return torch.utils.data.TensorDataset(images, labels)

    return split(images), split(images // 2)


class Tiny(nn.Sequential):
    def __init__(self, in_channels, image_size, out_dim, width=8):
        self.feature_dim = out_dim or width
        super().__init__(
            nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
            nn.Linear(width * ((image_size + 1) // 2) ** 2, self.feature_dim),
        )  # fmt: skip


class Neighbors(nn.Module):
    def __init__(self, temperature=0.2):
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings, labels):
        z, y = embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])
        self_ = torch.eye(len(z), dtype=torch.bool, device=z.device)
        shares = (z @ z.T / self.temperature).masked_fill(self_, float("-inf")).softmax(1)
        return -(shares * ((y[:, None] == y) & ~self_)).sum(1).clamp(min=1e-9).log().mean()


class Darken:
    def __init__(self, most=0.3):
        self.most = most

    def __call__(self, views, generator):
        factors = 1 - self.most * torch.rand(len(views), 1, 1, 1, generator=generator, device=views.device)
        return (views * factors).to(torch.uint8)


class Means:
    def fit(self, features, labels):
        self.means = torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])

    def predict(self, features):
        return -torch.cdist(features, self.means)


class Lines:
    def __init__(self, folder, resumed_at):
        self.file = folder / "lines.txt"

    def write(self, event, step, values):
        with self.file.open("a") as file:
            file.write(f"{event} {step}\n")

    def close(self):
        pass
