"""A plain PyTorch training loop: the baseline of `hpc-supcon bench step`.

It follows the released code of SupContrast (Khosla et al. 2020): torchvision's transforms on single samples in
DataLoader workers, twice; concatenated views; encoder, head, normalization; the dense loss with a mask of positives;
SGD; the loss is read in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from .loss_contenders import dense_supcon

WORKERS = 2
POLICIES = ("flip_crop", "simaugment")


class TwoCrops:
    """A transform that makes two views of one PIL image."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


class PilImages(Dataset[tuple[list[Tensor], int]]):
    """Images in memory, uint8 [N, C, H, W], as a dataset of PIL images like torchvision's CIFAR10."""

    def __init__(self, images: Tensor, labels: Tensor, transform: TwoCrops) -> None:
        self.arrays = images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def sample_transform(size: int, mean: Sequence[float], std: Sequence[float], policy: str) -> Any:
    """This package's policies `flip_crop` and `simaugment` at their default strengths, as torchvision transforms."""
    assert policy in POLICIES
    color: list[Any] = []
    if policy == "simaugment":
        gray = [transforms.RandomGrayscale(p=0.2)] if len(mean) == 3 else []
        color = [transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), *gray]
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            *color,
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


class PlainLoop:
    """`run()` trains for `steps` steps."""

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        data: PilImages,
        *,
        batch_size: int,
        steps: int,
        lr: float,
        device: torch.device,
    ) -> None:
        self.encoder, self.head, self.device = encoder.train(), head.train(), device
        parameters = [*encoder.parameters(), *head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
        self.loader = DataLoader(
            data,
            batch_size=batch_size,
            sampler=RandomSampler(data, num_samples=batch_size * steps),
            num_workers=WORKERS,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
        )
        self.losses: list[float] = []

    def run(self) -> None:
        for views, labels in self.loader:
            self.step(views, labels)

    def step(self, views: list[Tensor], labels: Tensor) -> None:
        images = torch.cat(views, dim=0).to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        embeddings = F.normalize(self.head(self.encoder(images)), dim=1)
        loss = dense_supcon(embeddings, labels.repeat(len(views)))
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
