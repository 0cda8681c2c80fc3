"""Images of five channels of 16 bits on several ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hpc_supcon.checkpoint import load_newest
from hpc_supcon.config import load_config
from hpc_supcon.data import full_scale
from hpc_supcon.distributed.collectives import gather_rows
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.features import read_indexed
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.stages.probe import probe
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 48, classes: 3, channels: 5, image_size: 8, bits: 16}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.iterations=3", "log.tensorboard=false", "log.progress=false", "runtime.threads=1",
    "probe.kind=[knn, softmax]", "probe.knn.k=3", "probe.softmax={epochs: 4, batch_size: 16}",
]  # fmt: skip


def levels(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, full_scale(torch.uint16) + 1, (n, 5, 3, 3), generator=generator).to(torch.uint16)


def gathered(rank, world_size, sizes):
    return gather_rows(levels(sizes[rank], rank)).int()


@pytest.mark.parametrize("sizes", [(4,), (3, 3), (2, 5), (1, 0, 4)])
def test_rows_of_16_bits_are_gathered_as_they_are(sizes):
    expected = torch.cat([levels(n, rank) for rank, n in enumerate(sizes)]).int()
    assert all(torch.equal(rows, expected) for rows in run_ranks(gathered, len(sizes), sizes))


def evaluated(rank, world_size, folder, train):
    """(normalization of the run, results of its probes, pixels of the test split that this rank reads)."""
    config = load_config("default", [*SETTINGS, f"run_dir={folder}"])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    data = load_data(config, runtime)
    if train:
        pretrain(config, runtime, data)
    found, _ = load_newest(Path(folder) / "checkpoints")
    results = probe(Path(folder), config, runtime, data)
    images, *_ = read_indexed(data.splits.test, runtime)
    kept = json.loads(json.dumps([{k: v for k, v in result.items() if k != "seconds"} for result in results]))
    return found.state["normalization"], kept, gather_rows(images).int()


def test_two_ranks_train_and_their_probes_are_those_of_one(tmp_path):
    run_ranks(evaluated, 2, tmp_path / "run", True)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (one,) = run_ranks(evaluated, 1, tmp_path / "run", False)
    first, second = run_ranks(evaluated, 2, tmp_path / "copy", False)
    assert one[0] == first[0] == second[0]
    assert one[0]["bits"] == 16
    assert one[1] == first[1] == second[1]
    assert torch.equal(one[2], first[2])
    assert torch.equal(first[2], second[2])
