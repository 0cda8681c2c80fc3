"""A whole run through every loader: the same images, cropped on the device or while decoding."""

from __future__ import annotations

import json

import pytest

from tests.commands import succeed

from ..data.odd_images import cut, jpeg
from .contract import save, write_folder
from .extras import require

require("ffcv", "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++; pip install ffcv")
require("nvidia.dali", "pip install nvidia-dali-cuda130")

SETTINGS = [
    "report.embeddings=false",
    "data.source=image_folder", "data.image_size=32", "data.batch_size=8", "data.workers=2", "model.encoder=conv",
    "model.projection_hidden=16", "model.projection_dim=8", "train.epochs=2", "probe.linear.epochs=2",
    "log.every_steps=1", "log.tensorboard=false", "runtime.threads=1", "data.validation_fraction=0",
    "probe.linear.lrs=[1e-2]",
]  # fmt: skip


def run(*arguments):
    succeed(*arguments)


@pytest.mark.parametrize("crop", ["false", "true"])
@pytest.mark.parametrize("loader", ["resident", "torch", "ffcv", "dali"])
def test_a_run_has_results_with_every_loader(tmp_path, loader, crop):
    """Also with damaged images, where the policy is to replace them; no .beton file is made of such."""
    root = write_folder(tmp_path / "images", suffix="jpg")
    where = [f"data.root={root}"]
    if loader == "ffcv":
        run("convert", str(root), str(tmp_path / "set.beton"))
        where = [f"data.beton={tmp_path}/set.beton"]
    else:
        save(root / "test" / "b" / "1.jpg", seed=7)
        for path in ("train/a/03.jpg", "test/b/0.jpg"):
            (root / path).write_bytes(cut(jpeg(), 0.5))
        where.append("data.on_corrupt=replace")
    more = [f"data.loader={loader}", f"data.crop_while_decoding={crop}", f"run_dir={tmp_path}/r"]
    run("run", "default", *SETTINGS, *where, *more)
    events = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert events[0]["loader"] == loader
    steps = [e for e in events if e["event"] == "train"]
    assert len(steps) == 2 * (26 // 8)
    assert all(0 <= e["data_wait"] <= 1 for e in steps)
    result = json.loads((tmp_path / "r/results.json").read_text())["results"][0]
    assert result.get("left_out", {}) == ({} if loader == "ffcv" else {"train": 1, "test": 1})
