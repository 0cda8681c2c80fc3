from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import hpc_supcon as hs

FAST = {
    "data.batch_size": 64, "train.iterations": 6, "optim.warmup_epochs": 0, "log.every_steps": 2,
    "log.progress": False, "log.tensorboard": False, "runtime.device": "cpu", "deterministic": True,
    "data.train_images": 256, "model.projection_hidden": 32, "model.projection_dim": 16,
}  # fmt: skip


class Tiny(nn.Module):
    """An encoder of a user's."""

    feature_dim = 16

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, 2, 1)

    def forward(self, x):
        return torch.relu(self.conv(x)).amax((2, 3))


@pytest.fixture(scope="session")
def digits():
    """(train, test) of scikit-learn's digits as torch Datasets."""
    found = load_digits()
    images = torch.tensor(found.images * 15.9, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(found.target)
    return TensorDataset(images[:400], labels[:400]), TensorDataset(images[400:600], labels[400:600])


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short run, probed by knn: its folder is only read."""
    made = hs.pretrain("quickstart", run_dir=tmp_path_factory.mktemp("api") / "run", settings=FAST)
    hs.probe(made, "knn")
    return made
