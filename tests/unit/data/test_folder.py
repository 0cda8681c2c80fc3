"""Claims about image folders: how they are read, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import load_splits
from hpc_supcon.errors import ConfigError, CorruptSample, DataError


def save(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train with 10 cats and 6 dogs, test with 2 of each."""
    for split, counts in {"train": {"cat": 10, "dog": 6}, "test": {"cat": 2, "dog": 2}}.items():
        for name, count in counts.items():
            for i in range(count):
                save(tmp_path / split / name / f"{i:02d}.png", seed=len(split + name) * 100 + i)
    return tmp_path


def stack(root: Path, **options: object) -> torch.Tensor:
    return load_splits("image_folder", root=root, validation_fraction=0, **options).train.stack()


def test_images_are_read_as_pillow_reads_them_in_the_order_of_their_names(root):
    splits = load_splits("image_folder", root=str(root), validation_fraction=0)
    assert splits.classes == ("cat", "dog")
    assert (splits.channels, splits.image_size) == (3, 8)
    assert splits.train.labels.tolist() == [0] * 10 + [1] * 6
    paths = [*sorted((root / "train" / "cat").iterdir()), *sorted((root / "train" / "dog").iterdir())]
    expected = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths])
    assert torch.equal(splits.train.stack(), expected)
    assert torch.equal(splits.train.read(12), expected[12])
    assert splits.validation is None
    assert len(splits.test) == 4


def test_stacks_of_more_than_one_chunk_keep_their_order(tmp_path):
    for i in range(300):
        path = tmp_path / "train" / "a" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1), i % 256).save(path)
    save(tmp_path / "test" / "a" / "0.png", size=(1, 1), mode="L")
    assert stack(tmp_path).flatten().tolist() == [i % 256 for i in range(300)]


def test_without_a_validation_folder_a_validation_split_is_taken_from_train(root):
    splits = load_splits("image_folder", root=root, validation_fraction=0.2, seed=1)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (13, 3, 4)
    paths = [*splits.train.paths, *splits.validation.paths]
    assert sorted(paths) == sorted((root / "train").rglob("*.png"))


def test_val_is_the_validation_set_where_test_exists_and_otherwise_the_test_set(root):
    (root / "test").rename(root / "val")
    alone = load_splits("image_folder", root=root)
    assert all(path.is_relative_to(root / "val") for path in alone.test.paths)
    for name in ("cat", "dog"):
        save(root / "test" / name / "x.jpeg")
    both = load_splits("image_folder", root=root)
    assert [len(both.train), len(both.validation), len(both.test)] == [16, 4, 2]
    assert all(path.is_relative_to(root / "val") for path in both.validation.paths)


def test_image_size_resizes_the_shorter_side_and_crops_the_center(root):
    # columns black, gray and white in thirds: the center square of the image is the gray third
    image = Image.new("L", (60, 20))
    image.paste(128, (20, 0, 40, 20))
    image.paste(255, (40, 0, 60, 20))
    image.convert("RGB").save(root / "train" / "cat" / "00.png")
    images = stack(root, image_size=4)
    assert images.shape == (16, 3, 4, 4)
    assert (images[0][:, :, 1:3] == 128).all()
    reference = Image.open(root / "train" / "cat" / "01.png").resize((4, 4), Image.Resampling.BILINEAR)
    assert torch.equal(images[1], torch.from_numpy(np.array(reference)).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_converts_every_8_bit_mode(root, mode, channels):
    name = "00.jpg" if mode == "CMYK" else "00.png"
    (root / "train" / "cat" / "00.png").unlink()
    save(root / "train" / "cat" / name, mode=mode)
    assert stack(root, channels=channels).shape == (16, channels, 8, 8)


def test_a_transparent_palette_converts_without_a_warning(root):
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(root / "train" / "cat" / "00.png", transparency=b"\x00\x80")
    assert stack(root, channels=3)[0, :, 0, 0].tolist() == [10, 20, 30]


def notes_of(root: Path, **options: object) -> list[str]:
    """The lines for the user."""
    lines: list[str] = []
    load_splits("image_folder", root=root, validation_fraction=0, note=lines.append, **options)
    return lines


def test_what_desktops_and_archives_create_is_passed_over_with_one_line(root):
    assert notes_of(root) == []
    (root / ".DS_Store").touch()  # beside the splits, where nothing is listed
    (root / "train" / ".DS_Store").touch()
    save(root / "train" / ".ipynb_checkpoints" / "0.png")
    save(root / "train" / "__MACOSX" / "0.png")
    (root / "train" / "labels.csv").touch()
    save(root / "test" / "dog" / ".thumbnails" / "0.png")
    for name in ("._00.png", "Thumbs.db", "ehthumbs.db", "desktop.ini"):
        (root / "train" / "cat" / name).touch()
    assert len(stack(root)) == 16
    (line,) = notes_of(root)
    assert line.startswith(f"{root}: passed over 3 folders and 5 files: train/.DS_Store, train/.ipynb_checkpoints, ")
    assert line.endswith(" ...")


@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "no folder"])
def test_a_class_may_be_absent_from_the_held_out_splits(root, empty):
    for i in range(4):
        save(root / "train" / "eel" / f"{i}.png")
    save(root / "val" / "eel" / "0.png")
    if empty:
        for folder in (root / "test" / "eel", root / "val" / "cat", root / "val" / "dog"):
            folder.mkdir(parents=True)
    splits = load_splits("image_folder", root=root)
    assert splits.train.classes == splits.validation.classes == splits.test.classes == ("cat", "dog", "eel")
    assert splits.validation.labels.tolist() == [2]
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert notes_of(root) == [
        f"{root / 'val'}: no image of cat, dog; its scores are averages over the other 1 of 3 classes",
        f"{root / 'test'}: no image of eel; its scores are averages over the other 2 of 3 classes",
    ]


def test_an_empty_folder_of_a_class_that_train_does_not_have_is_no_class(root):
    (root / "test" / "wolf").mkdir()
    assert load_splits("image_folder", root=root).classes == ("cat", "dog")


@pytest.mark.parametrize("where", ["train/cat", "test/dog"])
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_what_would_block_whoever_opens_it_is_refused_by_name(root, where, kind):
    path = root / where / "x.jpg"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as it:
            it.bind(os.path.relpath(path))  # the path of a socket must be short
    else:
        path.symlink_to("/dev/zero")
    refused(root, f"{path} is {kind}, not an image file")


def test_names_that_are_not_utf8_are_read_and_printed_with_escapes(root):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        save(root / split / name / os.fsdecode(b"\xff.png"))
    splits = load_splits("image_folder", root=root, validation_fraction=0)
    assert splits.classes == (name, "cat", "dog")
    assert len(splits.train.stack()) == 17
    (root / "test" / name / os.fsdecode(b"\xff.png")).unlink()
    assert notes_of(root) == [
        f"{root}/test: no image of caf\\xe9; its scores are averages over the other 2 of 3 classes"
    ]
    (root / "train" / name / os.fsdecode(b"\xfe.txt")).touch()
    refused(root, r"train/caf\xe9/\xfe.txt is not an image file")


def test_upper_case_suffixes_and_linked_files_are_read(root):
    save(root / "train" / "cat" / "10.PNG")
    (root / "train" / "cat" / "11.png").symlink_to(root / "train" / "cat" / "00.png")
    assert len(stack(root)) == 18


# ---- layouts that are refused


def refused(root: Path, *parts: str, **options: object) -> None:
    """Loading and decoding raises a DataError of one line that contains every part."""
    with pytest.raises(DataError) as caught:
        stack(root, **options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_root_is_refused(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "data.root")


def test_without_a_root_the_error_says_what_to_set():
    with pytest.raises(DataError, match=r"image_folder needs data\.root"):
        load_splits("image_folder")


def test_a_root_without_train_is_refused(root):
    (root / "train").rename(root / "training")
    refused(root, str(root / "train"), "does not exist")


def test_a_root_without_test_and_val_is_refused(root):
    (root / "test").rename(root / "holdout")
    refused(root, str(root), "neither test/ nor val/")


def test_a_split_without_classes_is_refused(root):
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    (root / "test" / "cat").rmdir()
    (root / "test" / "dog").rmdir()
    refused(root, str(root / "test"), "has no class folders")


def test_an_empty_class_folder_of_train_is_refused(root):
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / ".hidden").touch()
    refused(root, str(root / "train" / "eel"), "has no images: add some, or remove this class from every split")


def test_a_split_without_any_image_is_refused(root):
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    refused(root, f"{root / 'test'} has no images")


def test_a_class_that_train_does_not_have_is_refused(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")
    refused(root, f"{root / 'test'} has images of wolf but none of dog, and {root / 'train'} has no such class")
    save(root / "test" / "dog" / "0.png")
    refused(root, f"{root / 'test'} has images of wolf, and", "rename the folder", "or remove it from test")


def test_following_the_advice_about_an_empty_test_class_is_enough(root):
    for path in (root / "test" / "dog").iterdir():
        path.unlink()
    assert len(load_splits("image_folder", root=root).test) == 2
    (root / "test" / "dog").rmdir()
    assert len(load_splits("image_folder", root=root).test) == 2


def test_an_image_next_to_the_class_folders_is_refused(root):
    refused(root, str(save(root / "train" / "stray.png")), "next to the class folders")


def test_a_file_in_a_class_folder_that_is_not_an_image_is_refused(root):
    (root / "train" / "cat" / "notes.txt").write_text("cats")
    refused(root, str(root / "train" / "cat" / "notes.txt"), "not an image file")


def test_a_folder_within_a_class_folder_is_refused(root):
    save(root / "train" / "cat" / "more" / "0.png")
    refused(root, str(root / "train" / "cat" / "more"), "folder within a class folder")


def test_broken_links_are_refused(root):
    (root / "train" / "loop").symlink_to(root / "train" / "loop")
    refused(root, str(root / "train" / "loop"), "is a broken link")
    (root / "train" / "loop").unlink()
    (root / "train" / "cat" / "gone.png").symlink_to(root / "gone.png")
    refused(root, str(root / "train" / "cat" / "gone.png"), "does not decode")


# ---- images that are refused


def damage(path: Path, kind: str) -> None:
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not an image\n" * 50)
    elif kind == "truncated":
        save(path, size=(64, 64))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "header only":
        save(path, size=(64, 64))
        path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("kind", ["zero bytes", "text", "truncated", "header only"])
@pytest.mark.parametrize("name", ["cat/00.png", "dog/03.jpg"])
def test_an_image_that_does_not_decode_is_named(root, kind, name):
    path = root / "train" / name
    damage(path, kind)
    with pytest.raises(CorruptSample) as caught:
        stack(root, image_size=8)
    assert str(path) in str(caught.value)
    assert "does not decode" in str(caught.value)
    assert ("the file is empty" in str(caught.value)) == (kind == "zero bytes")


def test_reading_one_image_that_does_not_decode_names_it(root):
    path = root / "train" / "dog" / "05.png"
    damage(path, "text")
    source = load_splits("image_folder", root=root, validation_fraction=0).train
    source.read(14)
    with pytest.raises(CorruptSample, match=str(path)):
        source.read(15)


def test_mixed_sizes_are_refused_and_two_images_named(root):
    odd = save(root / "train" / "dog" / "00.png", size=(9, 8))
    refused(root, "mixed sizes", str(root / "train" / "cat" / "00.png"), "8x8", str(odd), "9x8", "data.image_size")
    assert stack(root, image_size=8).shape == (16, 3, 8, 8)


def test_an_image_that_is_not_square_needs_image_size(root):
    refused(root, str(save(root / "train" / "cat" / "00.png", size=(12, 8))), "12x8", "data.image_size")


def test_a_gray_image_among_rgb_images_is_refused(root):
    refused(root, str(save(root / "train" / "dog" / "00.png", mode="L")), "mode L", "data.channels=3")


@pytest.mark.parametrize("name", ["cat/00.png", "dog/00.png"])
@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_modes_that_are_neither_gray_nor_rgb_are_refused(root, name, mode):
    refused(root, str(save(root / "train" / name, mode=mode)), f"mode {mode}", "data.channels=3")


def test_cmyk_is_refused(root):
    refused(root, str(save(root / "train" / "cat" / "10.jpg", mode="CMYK")), "mode CMYK", "data.channels=3")


@pytest.mark.parametrize("name", ["cat/00.png", "dog/00.png"])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_16_bit_images_are_refused_for_any_number_of_channels(root, name, channels):
    path = root / "train" / name
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)
    refused(root, str(path), "more than 8 bits", channels=channels)


def test_an_image_of_too_many_pixels_is_refused(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((12, 12), (30, 30)):  # Pillow warns about the one and raises about the other
        refused(root, str(save(root / "train" / "dog" / "00.png", size=size)), "limit", image_size=8)


@pytest.mark.parametrize("option", [{"channels": 0}, {"channels": 65}, {"image_size": 0}])
def test_sizes_and_channels_out_of_range_are_refused(root, option):
    with pytest.raises(ConfigError, match=f"data.{next(iter(option))} must be"):
        load_splits("image_folder", root=root, **option)
