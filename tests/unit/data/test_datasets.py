"""Claims about torch Datasets as sources: forms of items, where labels come from, how errors name them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hpc_supcon.data import EvalOrder, build_loader, channel_statistics, fingerprint, load_splits
from hpc_supcon.data.loaders import LoaderOptions, choose_loader
from hpc_supcon.data.sources.datasets import dataset_splits
from hpc_supcon.errors import ConfigError, CorruptSample, DataError

from ...loaders.contract import write_folder

N, CLASSES = 12, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(N) % CLASSES


class Items(Dataset):
    """Knows nothing of this package: torch's protocol alone. Counts what is asked of it."""

    def __init__(self, image=Image.fromarray, label=int, items=None):
        self.image, self.label, self.asked = image, label, 0
        self.items = items

    def __len__(self):
        return N if self.items is None else len(self.items)

    def __getitem__(self, i):
        self.asked += 1
        return (self.image(PIXELS[i]), self.label(LABELS[i])) if self.items is None else self.items[i]


def open_pair(train, test=None, **options):
    return dataset_splits({"train": train, "test": Items() if test is None else test}, **options)


def read_all(source):
    return torch.stack([source.read(i) for i in range(len(source))])


RGB = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
GRAY = torch.from_numpy(PIXELS[..., 0]).unsqueeze(1)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


IMAGES = [
    (Image.fromarray, RGB),
    (lambda x: x, RGB),
    (tensor, RGB),
    (lambda x: x[..., 0], GRAY),
    (lambda x: x[..., :1], GRAY),
    (lambda x: tensor(x)[0], GRAY),
    (lambda x: tensor(x)[:1], GRAY),
    (lambda x: Image.fromarray(np.ascontiguousarray(x[..., 0])), GRAY),
]


@pytest.mark.parametrize(("image", "expected"), IMAGES)
def test_every_form_of_an_image_has_the_same_pixels(image, expected):
    train, _, test = open_pair(Items(image), Items(image))
    assert (train.channels, train.image_size, len(train), train.paths) == (expected.shape[1], 8, N, None)
    assert torch.equal(read_all(train), expected)
    assert torch.equal(test.stack(), expected)
    shown = [np.asarray(train.pil_image(i)).reshape(8, 8, -1) for i in range(N)]
    assert torch.equal(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize(
    "label",
    [
        int,
        np.int16,
        np.uint8,
        torch.tensor,
        lambda x: torch.tensor(int(x), dtype=torch.uint8),
        lambda x: np.array([x]),
    ],
)
def test_every_form_of_a_label_is_the_same_number(label):
    train, _, _ = open_pair(Items(label=label))
    assert train.labels.tolist() == LABELS.tolist()
    assert train.labels.dtype == torch.int64
    assert train.classes == ("0", "1", "2")


@pytest.mark.parametrize("key", ["targets", "labels"])
@pytest.mark.parametrize("form", [list, np.asarray, torch.as_tensor, lambda x: np.asarray(x)[:, None]])
def test_labels_that_a_dataset_keeps_are_taken_without_reading_its_images(key, form):
    dataset, kept = Items(items=[(PIXELS[i % N], i % 4) for i in range(500)]), form([i % 4 for i in range(500)])
    setattr(dataset, key, kept)
    train, _, _ = open_pair(dataset)
    assert train.labels.tolist() == [i % 4 for i in range(500)]
    assert dataset.asked < 20


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("targets", [2 - x for x in LABELS]),
        ("labels", ["cat", "dog"]),
        ("targets", LABELS + 0.5),
        ("labels", [[1], 2]),
    ],
)
def test_labels_that_are_kept_but_are_not_those_of_the_items_are_not_used(key, kept):
    dataset, notes = Items(), []
    setattr(dataset, key, kept)
    train, _, _ = open_pair(dataset, note=notes.append)
    assert train.labels.tolist() == LABELS.tolist()
    assert "all 12 items are read once" in notes[0]


def test_labels_that_a_transform_changes_are_read_from_the_items():
    dataset = Items(label=lambda x: 2 - int(x))
    dataset.targets, dataset.target_transform = [0] * N, lambda x: 2 - x
    assert open_pair(dataset)[0].labels.tolist() == (2 - LABELS).tolist()


def test_every_item_is_read_once_for_its_label():
    dataset = Items()
    open_pair(dataset)
    assert dataset.asked == N + 2  # and the first one twice, for the form of the images


def test_subsets_concatenations_and_tensors_keep_labels_and_classes():
    base = Items()
    base.targets, base.classes = LABELS.tolist(), ["a", "b", "c"]
    train, _, _ = open_pair(ConcatDataset([Subset(base, [7, 2, 5]), base]))
    assert train.classes == ("a", "b", "c")
    assert train.labels.tolist() == [*LABELS[[7, 2, 5]], *LABELS]
    assert base.asked < N + 8  # labels came from the list
    assert torch.equal(read_all(train), torch.cat([RGB[[7, 2, 5]], RGB]))
    tensors, _, _ = open_pair(TensorDataset(RGB.contiguous(), torch.from_numpy(LABELS)))
    assert torch.equal(tensors.stack(), RGB)
    assert tensors.labels.tolist() == LABELS.tolist()


def test_torchvision_and_an_image_folder_give_the_same_images(tmp_path):
    """ImageFolder of torchvision is written against nothing of this package."""
    root = write_folder(tmp_path)
    own = load_splits("image_folder", root=root, image_size=16, seed=3)
    folder = {split: torchvision.datasets.ImageFolder(root / split) for split in ("train", "test")}
    given = load_splits("folders", datasets=folder, image_size=16, seed=3)
    assert given.classes == own.classes
    for split in ("train", "validation", "test"):
        a, b = getattr(own, split), getattr(given, split)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.stack(), b.stack())


def test_items_are_converted_and_resized_as_image_files_are():
    wide = [(Image.fromarray(np.tile(PIXELS[i], (1, 3, 1))), i % 3) for i in range(N)]
    train, _, test = open_pair(Items(items=wide), Items(lambda x: x[..., 0]), image_size=4, channels=3)
    assert read_all(train).shape == (N, 3, 4, 4)
    assert read_all(test).shape == (N, 3, 4, 4)
    assert torch.equal(test.read(0)[0], test.read(0)[2])
    alpha = [(Image.fromarray(PIXELS[0]).convert("RGBA"), 0)]
    assert open_pair(Items(items=alpha), Items(label=lambda _: 0), channels=1)[0].read(0).shape == (1, 8, 8)


def test_splits_by_position_and_a_validation_split():
    a, b, c = Items(), Items(), Items()
    assert [x and x.items.dataset for x in dataset_splits((a, b))] == [a, None, b]
    assert [x and x.items.dataset for x in dataset_splits((a, b, c))] == [a, b, c]
    assert [x and x.items.dataset for x in dataset_splits({"validation": c, "test": b, "train": a})] == [a, c, b]
    splits = load_splits("own", datasets=(a, b, c), validation_fraction=0.5, train_images=6)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, N, N)


def test_images_without_labels():
    alone = Items(items=[PIXELS[i] for i in range(N)])
    for dataset in (alone, Items(), Items(items=[(PIXELS[i],) for i in range(N)])):
        splits = load_splits("own", datasets=dataset, labels="none", validation_fraction=0.25)
        assert (splits.classes, splits.test, len(splits.train), len(splits.validation)) == ((), None, 9, 3)
        assert not splits.train.labels.any()
    with pytest.raises(
        DataError, match=r"own, train split \(Items\): item 0 is an image without a label.*labels=none"
    ):
        load_splits("own", datasets=(alone, alone))


class Raises:
    """Item 5 raises."""

    targets = LABELS.tolist()

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == 5:
            raise ValueError("a pixel is missing")
        return PIXELS[i], int(LABELS[i])


def load_all(source, name, **options):
    options = LoaderOptions(timeout_s=60, **options)
    loader = build_loader(
        name, source, EvalOrder(len(source), 4), seed=0, rank=0, world_size=1, device="cpu", options=options
    )
    try:
        batches = list(loader.epoch(0))
        return torch.cat([b.images for b in batches]), torch.cat([b.index for b in batches]), loader.replaced
    finally:
        loader.close()


@pytest.mark.parametrize("name", ["resident", "torch"])
def test_loaders_serve_the_items(name):
    source = open_pair(Items(tensor), Items(tensor))[0].subset([4, 1, 7, 2, 0])
    if name == "torch":  # lambdas cannot be sent to another process
        source = open_pair(TensorDataset(RGB.contiguous(), torch.from_numpy(LABELS)))[0].subset([4, 1, 7, 2, 0])
    images, index, _ = load_all(source, name)
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(images, RGB[[4, 1, 7, 2, 0]])


@pytest.mark.parametrize("name", ["resident", "torch"])
def test_what_a_dataset_raises_is_named_or_replaced(name):
    train, _, _ = open_pair(Raises(), origin="mine")
    with pytest.raises(CorruptSample) as raised:
        load_all(train, name)
    text = str(raised.value)
    assert text.startswith("mine, train split (Raises): item 5 raised ValueError: a pixel is missing")
    assert "(test_datasets.py, line " in text
    images, index, replaced = load_all(train, name, on_corrupt="replace")
    assert (len(images), replaced) == (N, 1)
    assert 5 not in index.tolist()


@pytest.mark.parametrize("name", ["resident", "torch"])
def test_an_item_of_another_shape_is_named(name):
    items = [(PIXELS[i] if i != 7 else PIXELS[i][:4], 0) for i in range(N)]
    train, _, _ = open_pair(items, Items(label=lambda _: 0))
    with pytest.raises(
        DataError, match=r"train split \(list\): item 7 is 8x4 pixels, but the first image is 8x8: set"
    ):
        load_all(train, name)


def test_a_dataset_that_cannot_be_sent_to_workers_is_named():
    train, _, _ = open_pair(Items(lambda x: x))
    with pytest.raises(DataError, match=r"cannot be sent to worker processes \(.*lambda.*use data.loader=resident"):
        load_all(train, "torch")


def test_a_dataset_that_workers_cannot_receive_is_named():
    train, _, _ = open_pair(Unreceivable())
    with pytest.raises(DataError, match=r"cannot be sent to worker processes \(AttributeError: not here.*resident"):
        load_all(train, "torch")


class Unreceivable(Raises):
    """As of a class that was defined in a notebook."""

    def __setstate__(self, state):
        raise AttributeError("not here")

    def __getstate__(self):
        return {"any": 1}

    def __getitem__(self, i):
        return PIXELS[i], int(LABELS[i])


def bad(items, **options):
    """The error of a dataset of these items."""
    with pytest.raises(DataError) as raised:
        open_pair(Items(items=items), Items(label=lambda _: 0), origin="mine", **options)
    assert str(raised.value).startswith("mine, ")
    return str(raised.value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            (torch.rand(3, 8, 8), 0),
            "is a tensor of float32, not uint8 (or uint16): return pixels as they are, 0 to 255",
        ),
        ((np.zeros((8, 8, 3)), 0), "is an array of float64, not uint8"),
        ((np.zeros((8, 8), np.int16), 0), "is an array of int16, not uint8"),
        (
            (torch.zeros(8, 8, 3, dtype=torch.uint8), 0),
            "is a tensor of shape [8, 8, 3]; expected [channels, height, w",
        ),
        ((np.zeros((3, 8, 8), np.uint8), 0), "is an array of shape [3, 8, 8]; expected [height, width, channels]"),
        ((np.zeros(8, np.uint8), 0), "is an array of shape [8]"),
        ((np.zeros((0, 8), np.uint8), 0), "is an array of shape [0, 8]"),
        ((np.zeros((8, 6), np.uint8), 0), "is 6x8 pixels, not square: set data.image_size"),
        (("cat.jpg", 0), "is of type str, not a PIL image, a tensor or an array"),
        (None, "is of type NoneType"),
        ({"image": PIXELS[0], "label": 0}, "is of type dict"),
        ((PIXELS[0], 0, "x.jpg"), "has 3 parts; expected an image or (image, label)"),
        ((Image.new("I;16", (8, 8)), 0), "has more than 8 bits per channel (mode I;16)"),
        ((Image.new("CMYK", (8, 8)), 0), "is neither gray nor RGB: data.channels=3"),
        ((PIXELS[0], 1.5), "the label of item 0 is no integer but of type float '1.5'"),
        ((PIXELS[0], "cat"), "the label of item 0 is no integer but of type str 'cat'"),
        ((PIXELS[0], None), "the label of item 0 is no integer but of type NoneType 'None'"),
        ((PIXELS[0], torch.tensor([0, 1])), "the label of item 0 is no integer but of type Tensor"),
        ((PIXELS[0], -1), "the label of item 0 is -1, but there are 1 classes, numbered 0 to 0"),
    ],
)
def test_an_item_that_is_no_image_with_a_label_is_named(item, message):
    text = bad([item])
    assert text.startswith("mine, train split (Items): ")
    assert message in text
    assert "item 0 " in text


def test_a_label_beyond_the_classes_is_named():
    dataset = Items()
    dataset.classes = ["a", "b"]
    with pytest.raises(DataError, match=r"label of item 2 is 2, but there are 2 classes.*so are 3 more labels"):
        open_pair(dataset)
    with pytest.raises(DataError, match=r"test split \(Items\): the label of item 1 is 9, but there are 3 classes"):
        open_pair(Items(), Items(items=[(PIXELS[0], 0), (PIXELS[0], 9)]))
    dataset.classes = ["a", "b", "a"]
    with pytest.raises(DataError, match="two of its classes are called 'a'"):
        open_pair(dataset)


def test_images_that_change_are_refused():
    with pytest.raises(DataError, match=r"item 0 is another image when it is asked for again.*augment.policy"):
        open_pair(Items(lambda x: np.random.default_rng().integers(0, 256, x.shape, dtype=np.uint8)))


class Endless(IterableDataset):
    def __iter__(self):
        yield PIXELS[0], 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Items(), "no test split; give"),
        ({"test": Items()}, "no train split; give"),
        ({"train": Items(), "val": Items()}, "unknown splits val; give"),
        ((Items(),) * 4, "4 datasets; expected"),
        ((Endless(), Items()), "train split (Endless): it has no length"),
        ((DataLoader(Items()), Items()), "train split (DataLoader): a DataLoader cannot be"),
        ((Items(), Subset(Items(), [])), "test split (Subset of Items): it is empty"),
        ((42, Items()), "train split (int): it has no length"),
    ],
)
def test_what_are_no_splits_of_datasets_is_refused(found, message):
    with pytest.raises(DataError) as raised:
        dataset_splits(found, origin="mine")
    assert message in str(raised.value)
    assert str(raised.value).startswith("mine")


def test_a_beton_file_is_no_form_of_datasets(tmp_path):
    with pytest.raises(ConfigError, match=r"are not made of own; use data.beton=null"):
        load_splits("own", datasets=(Items(), Items()), beton=tmp_path / "x.beton")


def test_fingerprints_tell_other_images_and_other_labels():
    def of(train):
        return fingerprint(load_splits("own", datasets=(train, Items())))

    own = of(Items())
    assert not own.differences(of(Items(tensor)))
    assert of(Items(lambda x: 255 - x)).differences(own) == [
        "other items of a dataset in train",
        "other items of a dataset in validation",
    ]
    assert any("labels in train" in text for text in of(Items(label=lambda x: int(x + 1) % 3)).differences(own))


def test_auto_keeps_a_dataset_in_memory_where_it_fits(monkeypatch):
    train, _, _ = open_pair(Items())
    assert choose_loader(train, "cpu", LoaderOptions()) == (
        "resident",
        choose_loader(train, "cpu", LoaderOptions())[1],
    )
    monkeypatch.setattr("hpc_supcon.data.loaders._free_memory", lambda device: 100)
    assert choose_loader(train, "cpu", LoaderOptions())[0] == "torch"


def test_a_source_can_be_sent_to_another_process():
    train, _, _ = open_pair(Raises())
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(again.read(3), train.read(3))
    assert channel_statistics(again.subset([0]).stack())


def deep(n, channels=5, dtype=np.uint16, size=8):
    rng = np.random.default_rng(n)
    return [(rng.integers(0, np.iinfo(dtype).max, (size, size, channels), dtype=dtype), i % 2) for i in range(n)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_images_of_five_channels_are_read_as_they_are(dtype, as_tensor):
    items = deep(6, dtype=dtype)
    given = [(torch.from_numpy(x).permute(2, 0, 1), y) for x, y in items] if as_tensor else items
    train, _, test = dataset_splits((Items(items=given), Items(items=given)), channels=5)
    assert (train.channels, train.image_size, train.dtype) == (
        5,
        8,
        {1: torch.uint8, 2: torch.uint16}[dtype().nbytes],
    )
    for i, (x, _) in enumerate(items):
        assert torch.equal(train.read(i).int(), torch.from_numpy(x.transpose(2, 0, 1).astype(np.int32)))
    assert torch.equal(train.stack()[3].int(), train.read(3).int())
    assert torch.equal(test.subset([4]).read(0).int(), train.read(4).int())
    small, _, _ = dataset_splits((Items(items=given), Items(items=given)), image_size=4)
    assert small.read(0).shape == (5, 4, 4)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (deep(2), {"channels": 3}, "item 0 has 5 channels, but data.channels=3"),
        (deep(2, channels=1), {"channels": 3}, "item 0 has 1 channel, but data.channels=3"),
        (deep(1) + deep(1, channels=4), {}, "item 1 has 4 channel(s) of 16 bits, but the first image has 5 of 16"),
        (deep(1) + deep(1, dtype=np.uint8), {}, "item 1 has 5 channel(s) of 8 bits, but the first image has 5 of 16"),
        (
            deep(1, channels=3, dtype=np.uint8) + deep(1, channels=3),
            {},
            "item 1 has 3 channel(s) of 16 bits, but the",
        ),
    ],
)
def test_images_of_other_channels_or_bits_are_named(items, options, message):
    def read():
        return dataset_splits((Items(items=items), Items(items=items)), **options)[0].stack()

    with pytest.raises(DataError) as error:
        read()
    assert message in str(error.value)
