"""Claims about data sets by name, their splits, pixel statistics and the resident loader."""

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

from hpc_supcon.data import (
    ArraySource,
    EvalOrder,
    TrainOrder,
    build_loader,
    channel_statistics,
    load_splits,
    stratified_split,
)
from hpc_supcon.data.sources.source import fit_images
from hpc_supcon.data.sources.stratify import stratified_sample
from hpc_supcon.errors import ConfigError, DataError


def arrays(n: int = 50, channels: int = 3, size: int = 6, classes: int = 3) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(n) % classes, [str(c) for c in range(classes)])


# ---- splits


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100])
def test_a_stratified_sample_has_each_class_to_within_one_image(count):
    labels = torch.tensor([0] * 50 + [1] * 33 + [2] * 15 + [3] * 2)[torch.randperm(100)]
    rows = stratified_sample(labels, count=count, seed=0)
    assert len(rows) == count
    assert torch.equal(rows, rows.unique())
    for c, n in enumerate((50, 33, 15, 2)):
        assert abs((labels[rows] == c).sum() - n * count / 100) < 1
    assert torch.equal(rows, stratified_sample(labels, count=count, seed=0))


def test_training_images_are_taken_from_what_validation_leaves():
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


def test_a_split_depends_on_its_seed_alone():
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
def test_a_fraction_out_of_range_is_named(fraction):
    with pytest.raises(ConfigError, match="validation_fraction"):
        load_splits("digits", validation_fraction=fraction)


def test_classes_of_one_image_cannot_give_a_validation_set():
    with pytest.raises(DataError, match="no class has two images"):
        load_splits("synthetic", synthetic={"images": 4, "classes": 4})


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    with pytest.raises(ConfigError, match=r"'cifar'; did you mean 'cifar10(0)?'\? known: cifar10, cifar100, digits"):
        load_splits("cifar")


def test_synthetic_options_for_other_data_are_refused():
    with pytest.raises(ConfigError, match="options of synthetic data"):
        load_splits("digits", synthetic={"images": 3})


# ---- built-in data


def test_digits_are_scikit_learns_at_full_range():
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


def test_synthetic_images_are_balanced_reproducible_and_of_the_asked_form():
    options = {"images": 120, "classes": 6, "seed": 1}
    a = load_splits("synthetic", image_size=16, channels=1, synthetic=options, validation_fraction=0)
    b = load_splits("synthetic", image_size=16, channels=1, synthetic=options, validation_fraction=0, seed=9)
    assert a.train.stack().shape == (120, 1, 16, 16)
    assert torch.bincount(a.train.labels).tolist() == [20] * 6
    assert torch.equal(a.train.stack(), b.train.stack())
    assert torch.equal(a.test.stack(), b.test.stack())
    other = load_splits("synthetic", image_size=16, channels=1, synthetic=options | {"seed": 2})
    assert not torch.equal(a.test.stack(), other.test.stack())


def test_synthetic_images_can_be_learned_but_not_by_the_mean_color():
    splits = load_splits("synthetic", synthetic={"images": 1000, "classes": 5}, validation_fraction=0)

    def accuracy(features):
        model = LogisticRegression(max_iter=300).fit(features(splits.train), splits.train.labels.numpy())
        return model.score(features(splits.test), splits.test.labels.numpy())

    assert accuracy(lambda s: F.avg_pool2d(s.stack().float() / 255, 4).flatten(1).numpy()) > 0.6
    assert accuracy(lambda s: (s.stack().float() / 255).mean((2, 3)).numpy()) < 0.35


@pytest.mark.parametrize("options", [{"classes": 0}, {"images": 3}])
def test_synthetic_sizes_that_make_no_data_are_named(options):
    with pytest.raises(ConfigError, match="images >= classes >= 1"):
        load_splits("synthetic", synthetic=options)


# ---- MNIST's files


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


def test_array_data_takes_another_size_and_number_of_channels(tmp_path):
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
def test_missing_files_name_the_path_and_the_way_out(tmp_path, name):
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
        "text": b"this is no idx file at all",
        "another type": struct.pack(">i", 0xD03) + data[4:],
    }
    file.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["empty", "half", "header only", "text", "another type"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_idx_file_is_named(tmp_path, file, kind):
    raw = write_mnist(tmp_path)
    corrupt(raw / file, kind)
    with pytest.raises(DataError, match=str(raw / file)) as caught:
        load_splits("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_images_and_labels_of_different_number_are_named(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 39) + bytes(39))
    with pytest.raises(DataError, match=r"40 images but .*labels-idx1-ubyte 39 labels"):
        load_splits("mnist", root=tmp_path)


def test_a_label_beyond_the_classes_is_named(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 40) + bytes([10] * 40))
    with pytest.raises(DataError, match="label 10, but there are 10 classes"):
        load_splits("mnist", root=tmp_path)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"downloading MNIST into .* failed: .*no route to host") as caught:
        load_splits("mnist", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_files_that_are_there_are_not_downloaded(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("downloaded")

    write_mnist(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    assert len(load_splits("mnist", root=tmp_path, download=True).test) == 20


# ---- CIFAR's files


class OldDtype:
    """Pickles as NumPy's dtype in the spelling of the published files, which recent NumPy deprecates."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


class OldArray:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return np.ndarray, (self.array.shape, OldDtype(), self.array.tobytes())


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small files in CIFAR-10's form, with their md5 in the place of the published ones."""
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


def test_a_missing_cifar_file_is_named(cifar):
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


def test_a_constant_channel_can_be_divided_by():
    mean, std = channel_statistics(torch.full((3, 1, 4, 4), 51, dtype=torch.uint8))
    assert mean.tolist() == pytest.approx([0.2])
    assert std.tolist() == [1.0]


# ---- the resident loader


def resident(source, order, rank=0, world_size=1, seed=0):
    return build_loader("auto", source, order, seed=seed, rank=rank, world_size=world_size, device="cpu")


def test_batches_hold_the_images_their_index_names():
    source = arrays()
    loader = resident(source, TrainOrder(len(source), 8), seed=4)
    batches = list(loader.epoch(2))
    assert len(batches) == loader.steps_per_epoch == 6
    for batch in batches:
        assert torch.equal(batch.images, torch.stack([source.read(int(i)) for i in batch.index]))
        assert torch.equal(batch.labels, source.labels[batch.index])
    index = torch.stack([batch.index for batch in batches])
    assert torch.equal(index, TrainOrder(50, 8).epoch(4, 2, 0, 1))


def test_an_epoch_from_step_k_is_the_tail_of_the_epoch():
    loader = resident(arrays(), TrainOrder(50, 8))
    whole = [batch.index for batch in loader.epoch(1)]
    for start in range(7):
        tail = [batch.index for batch in loader.epoch(1, start)]
        assert [i.tolist() for i in tail] == [i.tolist() for i in whole[start:]]
    with pytest.raises(ValueError, match="step 7 is not in an epoch of 6 steps"):
        next(loader.epoch(1, 7))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_serve_the_global_batch(world_size):
    source = arrays()
    one = resident(source, TrainOrder(50, 8)).epoch(0)
    ranks = [resident(source, TrainOrder(50, 8), r, world_size).epoch(0) for r in range(world_size)]
    for batch, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_ranks_together_serve_the_source(world_size):
    source = arrays(n=2 if world_size == 3 else 50)
    loaders = [resident(source, EvalOrder(len(source), 7), r, world_size) for r in range(world_size)]
    batches = [batch for loader in loaders for batch in loader.epoch(0)]
    assert torch.equal(torch.cat([batch.images for batch in batches]), source.stack())


def test_changing_a_batch_leaves_the_source_alone():
    source = arrays()
    before = source.stack().clone()
    for batch in resident(source, TrainOrder(50, 50)).epoch(0):
        batch.images.zero_()
    assert torch.equal(source.stack(), before)


def test_a_closed_loader_serves_nothing():
    loader = resident(arrays(), TrainOrder(50, 8))
    under_way = loader.epoch(0)
    next(under_way)
    loader.close()
    assert list(under_way) == []
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


def test_a_batch_that_ranks_cannot_share_is_refused_before_decoding():
    class Undecodable(ArraySource):
        def stack(self):
            raise AssertionError("decoded")

    source = arrays()
    with pytest.raises(ConfigError, match="3 ranks: use 6 or 9"):
        resident(Undecodable(source.stack(), source.labels, source.classes), TrainOrder(50, 8), 0, 3)


def test_an_unknown_loader_gets_the_list():
    with pytest.raises(
        ConfigError, match=r"unknown data\.loader 'residnt'; did you mean 'resident'\? known: auto, dali, ffcv, res"
    ):
        build_loader("residnt", arrays(), TrainOrder(50, 8), seed=0, rank=0, world_size=1, device="cpu")
