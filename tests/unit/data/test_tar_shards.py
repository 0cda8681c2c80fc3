"""Claims about WebDataset tars: samples are those that webdataset itself reads, and each is found by its offset."""

from __future__ import annotations

import gc
import gzip
import io
import json
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from hpc_supcon.data import Columns, convert_splits, fingerprint, load_splits, open_source
from hpc_supcon.data.sources.verify import verify
from hpc_supcon.errors import CorruptSample, DataError

SIZES = {"train-000": 5, "train-001": 1, "train-002": 4, "test-000": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hpc-supcon" / "tar-index"


def png(value):
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(root, sizes=None):
    """By webdataset itself; image i of the whole set is of brightness i, and its label is i % 3."""
    root.mkdir(parents=True, exist_ok=True)
    value = 0
    for name, size in (sizes or SIZES).items():
        with webdataset.TarWriter(str(root / f"{name}.tar")) as writer:
            for _ in range(size):
                writer.write({"__key__": f"s{value:03d}", "png": png(value), "cls": value % 3})
                value += 1
    return root


def read_by_webdataset(files):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def brightness(source):
    return source.stack()[:, 0, 0, 0].tolist()


def test_samples_are_those_that_webdataset_reads(tmp_path):
    root = write_shards(tmp_path / "a")
    splits = open_source("webdataset", root)
    for split, source in (("train", splits.train), ("test", splits.test)):
        files = [str(path) for path in sorted(root.glob(f"{split}-*.tar"))]
        read = read_by_webdataset(files)
        assert [source.data(i) for i in range(len(source))] == [sample["png"] for sample in read]
        assert [splits.classes[label] for label in source.labels] == [sample["cls"].decode() for sample in read]
        assert [source.name(i).rpartition(" ")[2] for i in range(len(source))] == [s["__key__"] for s in read]
    assert brightness(splits.train) == list(range(10))
    assert brightness(splits.test) == [10, 11, 12]
    assert splits.validation is None
    assert splits.train.read(3).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["train-000", "train-001", "test-000"], "{train-{000..001},test-000}.tar"),
        (["train/0", "train/1", "test/0"], "{train/{0..1},test/0}.tar"),
        (["set-train-0", "set-train-1", "set-test-0"], "set-{train-{0..1},test-0}.tar"),
        (["train/0", "train/1", "test/0"], ""),
    ],
)
def test_folders_and_patterns_name_splits(tmp_path, names, pattern):
    root = tmp_path / "a"
    for i, name in enumerate(names):
        write_tar(root / f"{name}.tar", [(f"{i}.png", png(i)), (f"{i}.cls", b"0")])
    splits = open_source("webdataset", f"{root}/{pattern}")
    assert (brightness(splits.train), brightness(splits.test)) == ([0, 1], [2])


def test_members_are_grouped_by_the_rules_of_webdataset(tmp_path):
    members = [
        ("__meta__", b"{}"),
        ("a/x.left.png", png(1)),
        ("a/x.cls", b"1"),
        ("a/y.PNG", png(2)),
        ("a/y.cls", b" 0\n"),
        ("a/y.txt", b"any"),
        ("noextension", b""),
        ("b/y.png", png(3)),
        ("b/y.cls", b"1"),
    ]
    root = tmp_path / "a"
    write_tar(root / "train.tar", members)
    write_tar(root / "test.tar", members)
    splits = open_source("webdataset", root)
    assert brightness(splits.train) == [1, 2, 3]
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert [sample["__key__"] for sample in read_by_webdataset([str(root / "train.tar")])] == ["a/x", "a/y", "b/y"]


def test_columns_name_extensions_and_entries(tmp_path):
    entry = json.dumps({"kind": "cat", "n": 3}).encode()
    members = [("x.a.png", png(1)), ("x.b.png", png(2)), ("x.json", entry), ("x.txt", b"dog")]
    root = tmp_path / "a"
    write_tar(root / "train.tar", members)
    write_tar(root / "test.tar", members)

    def open_with(**columns):
        return open_source("webdataset", root, columns=Columns(**columns))

    splits = open_with(image="b.png", label="txt")
    assert (splits.classes, brightness(splits.train)) == (("dog",), [2])
    assert open_with(image="a.png", label="json.kind").classes == ("cat",)
    assert open_with(image="a.png", label="json.n").classes == ("3",)
    for columns, message in [
        ({"label": "txt"}, "sample x: it has several images (a.png, b.png): set data.columns.image"),
        ({"image": "jpg", "label": "txt"}, "sample x: it has no .jpg (data.columns.image), but .a.png, .b.png"),
        (
            {"image": "a.png"},
            "sample x: it has no label .cls, but .a.png, .b.png, .json, .txt: set data.columns.label",
        ),
        ({"image": "a.png", "label": "json.no"}, "sample x: its label .json.no cannot be read: KeyError: 'no'"),
    ]:
        with pytest.raises(DataError) as raised:
            open_with(**columns)
        assert message in str(raised.value)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (4, np.uint8)])
def test_images_of_16_bits_or_more_channels_are_read_from_tars_and_tables(tmp_path, channels, dtype):
    pixels = np.random.default_rng(0).integers(0, 300, (4, 4, channels)).astype(dtype)
    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(data, "PNG")
    root = tmp_path / "a"
    write_tar(root / "train.tar", [("x.png", data.getvalue()), ("x.cls", b"0")])
    write_tar(root / "test.tar", [("x.png", data.getvalue()), ("x.cls", b"0")])
    (tmp_path / "x.png").write_bytes(data.getvalue())
    (tmp_path / "all.csv").write_text("path,label,split\nx.png,0,train\nx.png,0,test\n")
    for source, place in (("webdataset", root), ("manifest", tmp_path / "all.csv")):
        train = open_source(source, place, channels=channels).train
        assert (train.channels, train.image_size) == (channels, 4)
        for found in (train.read(0), train.stack()[0]):
            assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)


def test_the_index_is_made_once_and_again_when_a_tar_changes(tmp_path, cache, monkeypatch):
    root = write_shards(tmp_path / "a")
    before = fingerprint(open_source("webdataset", root))
    assert len(list(cache.glob("*.parquet"))) == len(SIZES)
    with monkeypatch.context() as patched:
        patched.setattr("hpc_supcon.data.sources.tar_index._members", None)
        again = open_source("webdataset", root)
    assert fingerprint(again) == before
    (next(iter(cache.glob("*.parquet")))).write_bytes(b"damaged")
    assert fingerprint(open_source("webdataset", root)) == before
    write_tar(root / "train-001.tar", [("x.png", png(99)), ("x.cls", b"2"), ("y.png", png(98)), ("y.cls", b"2")])
    assert brightness(open_source("webdataset", root).train) == [0, 1, 2, 3, 4, 99, 98, 6, 7, 8, 9]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source("webdataset", root).train) == 10


def test_a_tar_cut_short_anywhere_is_named_with_its_offset(tmp_path):
    """Wherever it is cut, but within the zeros after the mark of its end."""
    root = write_shards(tmp_path / "a", {"train-0": 4, "test-0": 2})
    shard = root / "train-0.tar"
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    mark = -(-end // 512) * 512
    cuts = sorted({*range(0, mark, 700), 0, 1, 511, 512, 513, 1024, mark - 1, mark, mark + 511})
    for cut in cuts:
        shard.write_bytes(whole[:cut])
        with pytest.raises(DataError) as raised:
            open_source("webdataset", root)
        text = str(raised.value)
        assert str(shard) in text, cut
        assert "cut short" in text or "is empty" in text, (cut, text)
        assert "\n" not in text
        assert cut == 0 or "at offset" in text, (cut, text)
    shard.write_bytes(whole)
    assert len(open_source("webdataset", root).train) == 4


def test_damaged_and_compressed_tars_are_named(tmp_path):
    root = write_shards(tmp_path / "a")
    shard = root / "train-000.tar"
    whole = bytearray(shard.read_bytes())

    def message(data):
        shard.write_bytes(data)
        with pytest.raises(DataError) as raised:
            open_source("webdataset", root)
        assert str(shard) in str(raised.value)
        return str(raised.value)

    assert "is compressed (gzip)" in message(gzip.compress(bytes(whole)))
    damaged = bytearray(whole)
    damaged[1024:1100] = b"x" * 76  # the header of a member
    assert "damaged" in message(bytes(damaged))
    assert "damaged or cut short" in message(b"no tar at all" * 100)
    members = [("x.png", png(0)), ("x.png", png(1)), ("x.cls", b"0")]
    write_tar(shard, members)
    assert "duplicate file name" in message(shard.read_bytes())


def test_what_is_no_set_of_tars_is_named(tmp_path):
    root = write_shards(tmp_path / "a")

    def message(place, **options):
        with pytest.raises(DataError) as raised:
            open_source("webdataset", place, **options)
        return str(raised.value)

    assert "train-003.tar does not exist" in message(f"{root}/{{train-{{000..003}},test-000}}.tar")
    assert "no tars of test, but of train" in message(f"{root}/train-{{000..002}}.tar")
    assert "which needs files on disk" in message("https://host/train-{0..1}.tar")
    assert "which needs files on disk" in message("pipe:touch /tmp/never.tar")
    (tmp_path / "empty").mkdir()
    assert "holds no .tar" in message(tmp_path / "empty")
    write_tar(tmp_path / "b" / "0.tar", [("x.png", png(0))])
    assert "neither its name nor that of its folder says its split" in message(tmp_path / "b")
    write_tar(tmp_path / "c" / "train.tar", [])
    write_tar(tmp_path / "c" / "test.tar", [("x.png", png(0)), ("x.cls", b"0")])
    assert "the tars of train hold no samples" in message(tmp_path / "c")
    write_tar(tmp_path / "c" / "train.tar", [("x.png", png(0)), ("x.cls", b"")])
    assert f"{tmp_path / 'c' / 'train.tar'}, sample x: the label is empty" in message(tmp_path / "c")
    with pytest.raises(DataError, match=r"webdataset needs data.root: a folder of tars"):
        open_source("webdataset")


def test_without_labels_all_tars_may_be_of_train(tmp_path):
    for i in range(2):
        write_tar(tmp_path / "a" / f"{i}.tar", [(f"{i}.png", png(i))])
    splits = load_splits("webdataset", root=tmp_path / "a", labels="none", validation_fraction=0)
    assert (brightness(splits.train), splits.classes, splits.test) == ([0, 1], (), None)


def test_damaged_images_are_corrupt_samples(tmp_path):
    root = tmp_path / "a"
    write_tar(root / "train.tar", [("x.png", png(0)), ("x.cls", b"0"), ("y.png", b"no image"), ("y.cls", b"0")])
    write_tar(root / "test.tar", [("x.png", png(0)), ("x.cls", b"0")])
    train = open_source("webdataset", root).train
    with pytest.raises(CorruptSample, match=r"image .*train.tar, sample y does not decode: it is not a JPEG"):
        train.stack()
    (problem,) = verify(root, source="webdataset")["train"].problems
    assert problem.index == 1
    (root / "train.tar").write_bytes((root / "train.tar").read_bytes()[:520])
    with pytest.raises(CorruptSample, match="sample x: the tar was cut short since"):
        train.read(0)


def test_subsets_conversion_and_workers(tmp_path):
    root = write_shards(tmp_path / "a")
    splits = load_splits("webdataset", root=root, validation_fraction=0.3, seed=1)
    both = brightness(splits.train) + brightness(splits.validation)
    assert sorted(both) == list(range(10))
    again = pickle.loads(pickle.dumps(splits.train))
    assert torch.equal(again.stack(), splits.train.stack())
    convert_splits("webdataset", open_source("webdataset", root), tmp_path / "w.beton")
    assert load_splits("webdataset", beton=tmp_path / "w.beton", validation_fraction=0).train.classes == (
        "0",
        "1",
        "2",
    )
