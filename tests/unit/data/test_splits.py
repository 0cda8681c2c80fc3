"""Claims about data sets by name, their splits and the statistics of their pixels."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torchvision import datasets

from hpc_supcon.data import channel_statistics, load_splits, stratified_split
from hpc_supcon.data.sources.source import fit_images
from hpc_supcon.data.sources.stratify import stratified_sample
from hpc_supcon.errors import ConfigError, DataError
from tests.unit.data.arrays import arrays

# ---- splits


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100])
def test_a_stratified_sample_is_proportional_to_within_one_image(count):
    labels = torch.tensor([0] * 50 + [1] * 33 + [2] * 15 + [3] * 2)[torch.randperm(100)]
    rows = stratified_sample(labels, count=count, seed=0)
    assert len(rows) == count
    assert torch.equal(rows, rows.unique())
    for c, n in enumerate((50, 33, 15, 2)):
        assert abs((labels[rows] == c).sum() - n * count / 100) < 1
    assert torch.equal(rows, stratified_sample(labels, count=count, seed=0))


def test_training_images_are_chosen_after_the_validation_split():
    whole, part = load_splits("digits"), load_splits("digits", train_images=100)
    assert len(part.train) == 100
    assert torch.equal(part.validation.labels, whole.validation.labels)
    with pytest.raises(ConfigError, match=r"data.train_images=9999: the training split has"):
        load_splits("digits", train_images=9999)


def test_a_split_is_disjoint_complete_and_stratified():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 4 + [3] * 2 + [4])[torch.randperm(137)]
    kept, picked = stratified_split(labels, fraction=0.1, seed=0)
    assert torch.equal(torch.cat((kept, picked)).sort().values, torch.arange(137))
    assert torch.bincount(labels[picked], minlength=5).tolist() == [10, 3, 1, 1, 0]
    assert (kept.diff() > 0).all()
    assert (picked.diff() > 0).all()


def test_a_large_fraction_leaves_every_class_one_image():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    kept, _ = stratified_split(labels, fraction=0.99, seed=0)
    assert labels[kept].tolist() == [0, 1, 2]


def test_a_split_depends_on_its_seed_only():
    labels = torch.arange(1000) % 10
    first = stratified_split(labels, fraction=0.1, seed=3)[1]
    torch.rand(1)
    assert torch.equal(first, stratified_split(labels, fraction=0.1, seed=3)[1])
    assert not torch.equal(first, stratified_split(labels, fraction=0.1, seed=4)[1])


def test_without_a_fraction_there_is_no_validation_set():
    splits = load_splits("synthetic", synthetic={"images": 40, "classes": 4}, validation_fraction=0)
    assert splits.validation is None
    assert len(splits.train) == 40


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="validation_fraction"):
        load_splits("digits", validation_fraction=fraction)


def test_classes_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match="no class has two images"):
        load_splits("synthetic", synthetic={"images": 4, "classes": 4})


def test_an_unknown_name_error_suggests_the_nearest_and_lists_all():
    with pytest.raises(ConfigError, match=r"'cifar'; did you mean 'cifar10(0)?'\? known: cifar10, cifar100, digits"):
        load_splits("cifar")


@pytest.mark.parametrize("option", [{"channels": 65}, {"image_size": 0}])
@pytest.mark.parametrize("source", [{"name": "digits"}, {"name": "mnist"}, {"name": "digits", "beton": "no.beton"}])
def test_sizes_and_channels_are_checked_before_any_file_is_read(source, option):
    with pytest.raises(ConfigError, match=f"data.{next(iter(option))} must be"):
        load_splits(**source, **option)


def test_synthetic_options_for_other_data_are_refused():
    with pytest.raises(ConfigError, match="options of synthetic data"):
        load_splits("digits", synthetic={"images": 3})


# ---- built-in data


def test_digits_are_those_of_scikit_learn_scaled_to_255():
    splits = load_splits("digits", validation_fraction=0.1)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [1295, 143, 359]
    assert (splits.channels, splits.image_size, len(splits.classes)) == (1, 8, 10)

    def rows(images, labels):
        flat = images.reshape(len(images), -1).tolist()
        return sorted((int(label), *image) for label, image in zip(labels, flat, strict=True))

    sixteenths = (torch.cat([part.stack() for part in parts]).double() * 16 / 255).round()
    theirs = load_digits()
    assert rows(sixteenths, torch.cat([part.labels for part in parts])) == rows(theirs.images, theirs.target)


def test_the_test_set_of_digits_does_not_depend_on_the_seed():
    a, b = load_splits("digits", seed=0), load_splits("digits", seed=1)
    assert torch.equal(a.test.stack(), b.test.stack())
    assert not torch.equal(a.validation.labels, b.validation.labels)
    assert torch.bincount(a.test.labels).min() >= 34


def test_synthetic_images_are_balanced_reproducible_and_of_the_given_size():
    options = {"images": 120, "classes": 6, "seed": 1}
    a = load_splits("synthetic", image_size=16, channels=1, synthetic=options, validation_fraction=0)
    b = load_splits("synthetic", image_size=16, channels=1, synthetic=options, validation_fraction=0, seed=9)
    assert a.train.stack().shape == (120, 1, 16, 16)
    assert torch.bincount(a.train.labels).tolist() == [20] * 6
    assert torch.equal(a.train.stack(), b.train.stack())
    assert torch.equal(a.test.stack(), b.test.stack())
    other = load_splits("synthetic", image_size=16, channels=1, synthetic=options | {"seed": 2})
    assert not torch.equal(a.test.stack(), other.test.stack())


def test_synthetic_classes_can_be_learned_but_not_from_the_mean_color():
    splits = load_splits("synthetic", synthetic={"images": 1000, "classes": 5}, validation_fraction=0)

    def accuracy(features):
        model = LogisticRegression(max_iter=300).fit(features(splits.train), splits.train.labels.numpy())
        return model.score(features(splits.test), splits.test.labels.numpy())

    assert accuracy(lambda s: F.avg_pool2d(s.stack().float() / 255, 4).flatten(1).numpy()) > 0.6
    assert accuracy(lambda s: (s.stack().float() / 255).mean((2, 3)).numpy()) < 0.35


@pytest.mark.parametrize("options", [{"classes": 0}, {"images": 3}])
def test_synthetic_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="images >= classes >= 1"):
        load_splits("synthetic", synthetic=options)


# ---- the files of MNIST


def write_mnist(root: Path, folder: str = "MNIST", train: int = 40, test: int = 20) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
    return raw


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read_as_torchvision_reads_it(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    splits = load_splits(name, root=tmp_path, validation_fraction=0)
    for source, train in ((splits.train, True), (splits.test, False)):
        reference = getattr(datasets, folder)(tmp_path, train=train)
        assert torch.equal(source.stack(), reference.data.unsqueeze(1))
        assert torch.equal(source.labels, reference.targets)
        assert source.classes == tuple(reference.classes)


def test_images_in_memory_are_converted_to_the_given_size_and_channels(tmp_path):
    write_mnist(tmp_path)
    plain = load_splits("mnist", root=tmp_path, validation_fraction=0).train.stack()
    splits = load_splits("mnist", root=tmp_path, image_size=20, channels=3)
    assert (splits.image_size, splits.channels, splits.train.read(0).shape) == (20, 3, (3, 20, 20))
    images = load_splits("mnist", root=tmp_path, image_size=20, channels=3, validation_fraction=0).train.stack()
    expected = F.interpolate(plain.float(), size=(20, 20), mode="bilinear", antialias=True).round()
    assert torch.equal(images, expected.expand(-1, 3, -1, -1).to(torch.uint8))


def test_gray_of_rgb_is_its_luminance():
    images = arrays(channels=3).stack()
    expected = images[:, 0] * 0.2989 + images[:, 1] * 0.587 + images[:, 2] * 0.114
    assert (fit_images(images, image_size=None, channels=1)[:, 0] - expected).abs().max() <= 0.51


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_errors_name_the_path_and_what_to_set(tmp_path, name):
    with pytest.raises(DataError, match=r"needs data\.root"):
        load_splits(name)
    with pytest.raises(DataError) as caught:
        load_splits(name, root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "data.root=PATH" in str(caught.value)
    assert "data.download=true" in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def corrupt(file: Path, kind: str) -> None:
    data = file.read_bytes()
    changed = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "header only": data[:8],
        "text": b"this is not an idx file",
        "another type": struct.pack(">i", 0xD03) + data[4:],
    }
    file.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["empty", "half", "header only", "text", "another type"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_idx_file_is_refused(tmp_path, file, kind):
    raw = write_mnist(tmp_path)
    corrupt(raw / file, kind)
    with pytest.raises(DataError, match=str(raw / file)) as caught:
        load_splits("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_different_numbers_of_images_and_labels_are_refused(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 39) + bytes(39))
    with pytest.raises(DataError, match=r"40 images but .*labels-idx1-ubyte 39 labels"):
        load_splits("mnist", root=tmp_path)


def test_a_label_without_a_class_is_refused(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 40) + bytes([10] * 40))
    with pytest.raises(DataError, match="label 10, but there are 10 classes"):
        load_splits("mnist", root=tmp_path)


def test_a_failed_download_is_an_error_of_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"downloading MNIST into .* failed: .*no route to host") as caught:
        load_splits("mnist", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_files_that_exist_are_not_downloaded(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("downloaded")

    write_mnist(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    assert len(load_splits("mnist", root=tmp_path, download=True).test) == 20


# ---- the files of CIFAR


class OldDtype:
    """Pickled as NumPy's dtype is in the published files, in a way that recent NumPy deprecates."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


class OldArray:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return np.ndarray, (self.array.shape, OldDtype(), self.array.tobytes())


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small files in the format of CIFAR-10, whose md5 replaces the published one."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {
        name: {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    old = {"data": OldArray(contents["data_batch_2"]["data"]), "labels": list(range(10))}
    md5 = {}
    for name, content in {
        **contents,
        "data_batch_2": old,
        "batches.meta": {"label_names": [f"class {c}" for c in range(10)]},
    }.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[n, md5[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["batches.meta"]})
    return folder, contents


def test_cifar_images_keep_their_channels_and_order(cifar):
    folder, contents = cifar
    splits = load_splits("cifar10", root=folder.parent, validation_fraction=0)
    assert (splits.channels, splits.image_size, len(splits.train), len(splits.test)) == (3, 32, 20, 10)
    expected = np.concatenate([contents["data_batch_1"]["data"], contents["data_batch_2"]["data"]])
    assert torch.equal(splits.train.stack(), torch.from_numpy(expected).view(20, 3, 32, 32))
    assert splits.train.labels.tolist() == list(range(10)) * 2
    assert splits.classes[3] == "class 3"


def test_a_pickle_that_is_not_the_published_one_is_never_read(cifar, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    folder, _ = cifar
    for name in ("test_batch", "batches.meta"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match=rf"{folder / name} is damaged"):
            load_splits("cifar10", root=folder.parent)
        (folder / name).write_bytes(original)
    assert not (tmp_path / "executed").exists()


def test_a_missing_cifar_file_is_refused(cifar):
    folder, _ = cifar
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match=rf"{folder / 'data_batch_2'} does not exist"):
        load_splits("cifar10", root=folder.parent)


# ---- statistics


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_equal_those_of_a_float_copy(channels):
    images = arrays(9000, channels).stack()
    mean, std = channel_statistics(images)
    copy = images.double() / 255
    torch.testing.assert_close(mean.double(), copy.mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(std.double(), copy.std((0, 2, 3), correction=0), atol=1e-7, rtol=0)


def test_a_constant_channel_has_standard_deviation_1():
    mean, std = channel_statistics(torch.full((3, 1, 4, 4), 51, dtype=torch.uint8))
    assert mean.tolist() == pytest.approx([0.2])
    assert std.tolist() == [1.0]
