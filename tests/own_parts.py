"""Parts as users write them, for tests: plain modules and functions that know nothing of hpc_supcon."""

from __future__ import annotations

import torch
from torch import nn


class Tiny(nn.Module):
    """An encoder."""

    def __init__(self, in_channels, image_size, out_dim, width=8, wrong=None):
        super().__init__()
        self.feature_dim = {"no width": None, "other width": 3}.get(wrong, out_dim or width)
        self.conv = nn.Conv2d(in_channels, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.latent = nn.Linear(width, out_dim or width)
        self.wrong = wrong

    def forward(self, x):
        if self.wrong == "raises":
            raise ValueError("cannot")
        maps = torch.relu(self.norm(self.conv(x)))
        if self.wrong == "maps":
            return maps
        features = self.latent(maps.mean((2, 3)))
        return {"list": [features], "integers": features.long()}.get(self.wrong, features)


def not_a_module(in_channels, image_size, out_dim):
    return lambda x: x


class ProxyLoss(nn.Module):
    """Neighborhood components over the batch, plus a cross-entropy of learned proxies: it has weights of its own."""

    def __init__(self, temperature=0.2, proxies=4, dim=8, wrong=None):
        super().__init__()
        self.temperature, self.wrong = temperature, wrong
        self.proxies = nn.Parameter(torch.linspace(-1, 1, proxies * dim).view(proxies, dim))

    def forward(self, embeddings, labels):
        assert embeddings.ndim == 3
        assert labels.shape == embeddings.shape[:1]
        z, y = embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])
        if self.wrong is not None:
            wrongs = {
                "rows": z.sum(1),
                "constant": torch.ones(()),
                "number": 1.0,
                "integer": torch.ones(3).long().sum(),
            }
            if self.wrong == "nan":
                return (z - z.detach()).square().sum().sqrt()
            return wrongs[self.wrong]
        off = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / self.temperature).masked_fill(~off, float("-inf"))
        same = (y[:, None] == y[None]) & off
        neighbors = -(logits.softmax(1) * same).sum(1).clamp(min=1e-12).log().mean()
        return neighbors + nn.functional.cross_entropy(z @ self.proxies.to(z).T, y)


class Noise(nn.Module):
    """A loss that draws random numbers."""

    def forward(self, embeddings, labels):
        return (embeddings * torch.rand_like(embeddings)).sum(-1).mean()


class Erase:
    """A policy: a square of each view becomes black."""

    def __init__(self, size=2, wrong=None):
        self.size, self.wrong = size, wrong

    def __call__(self, views, generator):
        if self.wrong == "floats":
            return views / 255
        if self.wrong == "crops":
            return views[..., 1:]
        n, side, device = len(views), views.shape[-1], views.device
        own = None if self.wrong == "global generator" else generator
        at = torch.randint(0, side - self.size + 1, (2, n, 1), generator=own, device=device)
        inside = (torch.arange(side, device=device) >= at) & (torch.arange(side, device=device) < at + self.size)
        return views.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


class Means:
    """A probe: the nearest class mean."""

    def __init__(self, power=2.0, wrong=None):
        self.power, self.wrong = power, wrong
        self.means = torch.empty(0)

    def fit(self, features, labels):
        self.means = torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])

    def predict(self, features):
        distances = torch.cdist(features, self.means, p=self.power)
        if self.wrong == "numbers":
            return distances.argmin(1)
        return distances[:, :1] if self.wrong == "shape" else -distances


class Shapes(torch.utils.data.Dataset):
    """A data set: a bright third of the image tells the class."""

    classes = ("top", "middle", "bottom")

    def __init__(self, images, seed, size):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(images) % 3
        self.images = torch.randint(0, 120, (images, 1, size, size), generator=generator).to(torch.uint8)
        for i, c in enumerate(self.targets.tolist()):
            self.images[i, :, c * size // 3 : (c + 1) * size // 3] = 200

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], int(self.targets[i])


def shapes(root, images=120, size=12):
    return {"train": Shapes(images, 0, size), "test": Shapes(images // 2, 1, size)}


class Lines:
    """A logger."""

    def __init__(self, folder, resumed_at, wrong=None):
        self.file = folder / "lines.txt"

    def write(self, event, step, values):
        with self.file.open("a") as file:
            file.write(f"{event} {step}\n")

    def close(self):
        pass
