"""hs.views shows what training would see, and Run.export writes what the command does."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

import hpc_supcon as hs
from hpc_supcon.errors import ConfigError, DataError, OutputError, RunFolderError

WHOLE = {"augment.policy": "flip_crop", "augment.crop_scale": [1.0, 1.0], "augment.crop_ratio": [1.0, 1.0]}


def test_without_augmentation_the_views_are_the_images_and_mirrored_ones_are_mirrored():
    equal = hs.views(settings={"augment.policy": "none", "data.views": 3}, images=5)
    assert equal.shape == (5, 4, 1, 8, 8)
    assert torch.allclose(equal[:, 1:], equal[:, :1].expand(-1, 3, -1, -1, -1), atol=1e-6)
    mirrored = hs.views(settings={**WHOLE, "augment.flip": 1.0}, images=5)
    assert torch.allclose(mirrored[:, 1], mirrored[:, 0].flip(-1), atol=1e-6)


def test_the_images_are_those_of_the_data_and_different_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = hs.views(images=4)
    known = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    nearest = torch.cdist(shown[:, 0].flatten(1), known.flatten(1)).min(dim=1)
    assert nearest.values.max() < 0.02 * 8, "to the nearest gray level"
    assert len(set(nearest.indices.tolist())) == 4
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert not torch.allclose(shown[:, 1], shown[:, 2])
    assert torch.equal(shown, hs.views(images=4)), "of one seed"
    assert not torch.equal(shown, hs.views(settings={"seed": 1}, images=4))
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_of_objects_16_bits_and_crops_of_two_sizes(digits):
    of_objects = hs.views(settings={"augment.policy": "none"}, source=digits, images=1)
    assert torch.allclose(of_objects[0, 0], digits[0].tensors[0][0] / 255)
    synthetic = {"data.source": "synthetic", "data.synthetic.bits": 16, "data.synthetic.channels": 5}
    deep = hs.views(settings={**synthetic, "augment.policy": "none"}, images=2)
    assert torch.allclose(deep[:, 1], deep[:, 0], atol=1e-5)
    assert 0.2 < deep.mean() < 0.8
    multi = {"data.views": {"global": 2, "local": 4}, "loss.name": "swav", "augment.local.image_size": 4}
    multi["model.encoder"] = "resnet9_small"
    assert hs.views(settings=multi, images=2).shape == (2, 3, 1, 8, 8)
    tiny = torch.utils.data.Subset(digits[0], range(3))
    few = {"data.batch_size": 2, "data.labels": "none", "loss.name": "simclr", "data.validation_fraction": 0}
    assert len(hs.views(settings=few, source=tiny, images=9)) == 3, "all there are"


def test_what_is_wrong_is_told_as_by_pretrain(tmp_path):
    for arguments, error, told in [
        ({"config": "quickstar"}, ConfigError, "did you mean 'quickstart'"),
        ({"settings": {"augment.flip": 2}}, ConfigError, "augment.flip"),
        ({"images": 0}, ConfigError, "at least 1"),
        ({"settings": {"data.source": "image_folder", "data.root": tmp_path / "no"}}, DataError, "no"),
    ]:
        with pytest.raises(error, match=told):
            hs.views(**arguments)


def test_a_run_writes_its_encoder_to_a_file_that_gives_the_same_features(run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run.export("torch-export", tmp_path / "e.pt2")
    assert path == tmp_path / "e.pt2"
    images = digits[0].tensors[0][:7]
    features = torch.export.load(path).module()(images / 255)
    assert torch.allclose(features, run.embed(images), atol=1e-5)
    assert run.export("safetensors", part="projection").name == f"{run.dir.name}-projection.safetensors"
    with pytest.raises(OutputError, match=r"e\.pt2"):
        run.export("torch-export", path)
    assert run.export("torch-export", str(path), force=True) == path
    with pytest.raises(ConfigError, match="unknown format 'onx'; did you mean 'onnx'"):
        run.export("onx")
    with pytest.raises(RunFolderError, match="probe"):
        run.export("safetensors", part="classifier", probe="mlp")
