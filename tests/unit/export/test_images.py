"""`embed` and `predict`: images in sorted order, the results of evaluation, damaged images reported or left out."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon import cli
from hpc_supcon.data import ArraySource, EvalTransform
from hpc_supcon.data.sources.builtin import digits
from hpc_supcon.data.sources.convert import convert
from hpc_supcon.errors import CorruptSample, DataError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.export import embed, load_part, open_images
from hpc_supcon.export.images import decode
from tests.commands import succeed

FAST = [
    "report.embeddings=false",
    "data.batch_size=256", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=1", "log.tensorboard=false", "runtime.threads=1", "probe.linear.epochs=5",
    "probe.linear.lrs=[1e-2]",
]  # fmt: skip
SHAPE = (1, 8, 8)
DIGITS = tuple("0123456789")


def command(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    return stopped.value.code or 0, *capsys.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "digits-run"
    succeed("run", "default", *FAST, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def test_digits():
    return digits()[1].subset(list(range(43)))


@pytest.fixture
def folder(tmp_path, test_digits):
    """ROOT/CLASS/NNN.png of 43 digits."""
    root = tmp_path / "images"
    for i in range(len(test_digits)):
        path = root / test_digits.classes[test_digits.labels[i]] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        test_digits.pil_image(i).save(path)
    return root


def number(path):
    """Index of the digit that a path of `folder` shows."""
    return int(path.rsplit("/", 1)[1].removesuffix(".png"))


@torch.no_grad()
def features_of(run, images):
    model, found = load_model(run)
    return model.eval().encoder(EvalTransform(**found.state["normalization"])(images))


@pytest.mark.parametrize("part", ["encoder", "projection"])
def test_embeddings_of_a_folder_equal_those_of_evaluation_in_the_order_of_sorted_paths(
    trained, folder, test_digits, tmp_path, capsys, part
):
    out = tmp_path / "out.npz"
    code, said, _ = command(
        capsys, "embed", trained, folder, "-o", out, "--part", part, "--batch-size", 10, "--device", "cpu"
    )
    assert code == 0
    with np.load(out, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    paths = [str(p) for p in arrays["paths"]]
    assert paths == sorted(str(p) for p in folder.rglob("*.png"))
    rows = [number(path) for path in paths]
    wanted = features_of(trained, test_digits.stack()[rows])
    if part == "projection":
        wanted = load_model(trained)[0].eval().heads["projection"](wanted).detach()
    assert arrays["embeddings"].dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(arrays["embeddings"]), wanted, rtol=1e-4, atol=1e-5)
    assert arrays["labels"].tolist() == test_digits.labels[rows].tolist()
    assert arrays["labels"].dtype == np.int64
    assert arrays["classes"].tolist() == list(DIGITS)
    assert said.strip() == f"{out}: 43 images, {wanted.shape[1]} numbers each, with labels"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.npz"]


def test_files_and_folders_can_be_mixed_and_images_of_no_class_have_no_labels(trained, folder, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(folder / "3", flat)
    (flat / "notes.txt").write_text("not an image")
    (flat / ".hidden.png").write_text("nor this")
    one = tmp_path / "one.webp"
    Image.new("L", (8, 8), 99).save(one, lossless=True)
    opened = open_images([one, flat, *flat.glob("[0-9]*.png")], SHAPE, DIGITS)
    assert list(opened.paths) == sorted([*map(str, flat.glob("[0-9]*.png")), str(one)])
    assert opened.labels is None
    assert opened.notes == (
        f"{flat}: passed over 1 file: .hidden.png",
        f"{flat}: left out 1 files that do not have the ending of an image file",
    )
    embed(load_part(trained, "encoder"), opened, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"embeddings", "paths"}
        assert len(arrays["embeddings"]) == len(opened.paths)
    assert open_images([folder / "3"], SHAPE, DIGITS).labels == (3,) * len(list(flat.glob("[0-9]*.png")))


def test_images_are_converted_to_the_size_and_channels_of_training(tmp_path):
    rng = np.random.default_rng(0)
    original = Image.fromarray(rng.integers(0, 256, (20, 33, 3), dtype=np.uint8))
    original.save(tmp_path / "a.png")
    original.convert("RGBA").save(tmp_path / "b.png")
    opened = open_images([tmp_path], SHAPE, ())
    (batch,) = decode(opened.source, 5)
    # the shorter side to 8 px, the central square of that, by Pillow itself
    small = original.convert("L").resize((13, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
    assert np.array_equal(batch.images[0, 0].numpy(), np.asarray(small))
    assert np.array_equal(batch.images[1, 0].numpy(), np.asarray(small))


@pytest.mark.parametrize("exif", ["transpose", "ignore"])
def test_images_are_turned_by_the_setting_of_the_run(trained, tmp_path, capsys, exif):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("exif: transpose", f"exif: {exif}"))
    turned, tag = digits()[1].pil_image(0), Image.Exif()
    tag[0x0112] = 3
    (tmp_path / "images").mkdir()
    turned.save(tmp_path / "images" / "a.png", exif=tag)
    turned.rotate(180 if exif == "transpose" else 0).save(tmp_path / "images" / "b.png")
    code, _, err = command(capsys, "embed", run, tmp_path / "images", "-o", tmp_path / "out.npz", "--device", "cpu")
    assert code == 0, err
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(*arrays["embeddings"])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 43, 100])
def test_every_image_is_decoded_once_and_in_order(folder, test_digits, batch_size, workers):
    opened = open_images([folder], SHAPE, DIGITS)
    batches = list(decode(opened.source, batch_size, workers=workers))
    assert [len(b.images) for b in batches] == [min(batch_size, 43 - s) for s in range(0, 43, batch_size)]
    assert [row for b in batches for row in b.indices] == list(range(43))
    wanted = test_digits.stack()[[number(path) for path in opened.paths]]
    assert torch.equal(torch.cat([b.images for b in batches]), wanted)


def test_only_a_few_batches_are_decoded_in_advance():
    class Counted(ArraySource):
        reads = 0

        def read(self, i):
            Counted.reads += 1
            return super().read(i)

    source = Counted(torch.zeros(1000, *SHAPE, dtype=torch.uint8), torch.zeros(1000, dtype=torch.int64), ("a",))
    stream = decode(source, 10)
    next(stream)
    stream.close()
    assert 10 <= Counted.reads <= 40


def test_linked_folders_are_listed_once_and_loops_end(folder, tmp_path):
    (folder / "3" / "up").symlink_to(folder)
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    Image.new("L", (8, 8)).save(other / "deep" / "x.JPG", format="jpeg")
    (folder / "link").symlink_to(other)
    assert len(open_images([folder], SHAPE, DIGITS).paths) == 44


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
    closed, listed = str(folder / "3"), os.scandir

    def scandir(path):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="/3 cannot be read: Permission denied"):
        open_images([folder], SHAPE, DIGITS)


def damage(folder):
    """Two images that do not decode, the second of 16 bits; their paths."""
    files = sorted(folder.rglob("*.png"))
    files[4].write_bytes(files[4].read_bytes()[:60])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(files[7])
    return [str(files[4]), str(files[7])]


def test_a_corrupt_image_is_an_error_or_left_out_and_reported(trained, folder, tmp_path, capsys):
    bad = damage(folder)
    out = tmp_path / "out.npz"
    code, _, err = command(capsys, "embed", trained, folder, "-o", out, "--batch-size", 3)
    assert code == 2
    assert f"{bad[0]} does not decode" in err
    assert "--skip-corrupt leaves such images out" in err
    assert not out.exists()
    code, said, err = command(capsys, "embed", trained, folder, "-o", out, "--batch-size", 3, "--skip-corrupt")
    assert code == 0
    assert "41 images" in said
    assert [line.split(" ")[3] for line in err.splitlines()] == bad
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == [str(p) for p in sorted(folder.rglob("*.png")) if str(p) not in bad]
        assert len(arrays["embeddings"]) == len(arrays["labels"]) == 41


def test_nothing_is_written_if_no_image_can_be_used(trained, tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    opened, part = open_images([tmp_path], SHAPE, DIGITS), load_part(trained, "encoder")
    with pytest.raises(DataError, match=r"none of 2 images can be used; the first: .*a\.png does not decode"):
        embed(part, opened, tmp_path / "out.npz", skip_corrupt=True, batch_size=1)
    with pytest.raises(CorruptSample, match=r"a\.png does not decode"):
        embed(part, opened, tmp_path / "out.npz")
    assert not list(tmp_path.glob("*npz*"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_beton_gives_its_images_and_labels(trained, test_digits, tmp_path, channels):
    stored = test_digits.stack().expand(-1, channels, -1, -1)
    # classes in another order: the labels are indices into the model's classes, not the file's
    source = ArraySource(stored.contiguous(), 9 - test_digits.labels, DIGITS[::-1])
    convert(source, tmp_path / "d.beton", name="digits/test", raw_fraction=1.0)
    opened = open_images([tmp_path / "d.beton"], SHAPE, DIGITS)
    assert opened.paths[5] == f"{tmp_path / 'd.beton'}#5"
    assert opened.labels == tuple(test_digits.labels.tolist())
    outputs = embed(load_part(trained, "encoder"), opened, tmp_path / "out.npz", batch_size=16)
    wanted = features_of(trained, test_digits.stack())
    # converting gray to RGB and back changes some pixels by one level
    torch.testing.assert_close(torch.from_numpy(outputs.values), wanted, rtol=0.02, atol=0.02)
    with pytest.raises(DataError, match="stands alone"):
        open_images([tmp_path / "d.beton", tmp_path], SHAPE, DIGITS)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_predictions_equal_those_of_the_probe(trained, folder, test_digits, tmp_path, capsys, suffix):
    out = tmp_path / f"out{suffix}"
    code, said, _ = command(capsys, "predict", trained, folder, "-o", out, "--batch-size", 16)
    assert (code, said.strip()) == (0, f"{out}: 43 images")
    if suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(out.read_text())))
        probabilities = [[float(row[f"p({name})"]) for name in DIGITS] for row in rows]
    else:
        written = json.loads(out.read_text())
        rows = written["images"]
        probabilities = [row["probabilities"] for row in rows]
        assert (written["classes"], written["skipped"]) == (list(DIGITS), [])
        assert written["checkpoint"].startswith("step-")
    assert [row["path"] for row in rows] == sorted(str(p) for p in folder.rglob("*.png"))
    images = test_digits.stack()[[number(row["path"]) for row in rows]]
    logits = load_probe(trained / "probes/linear").logits(features_of(trained, images))
    wanted = logits.double().softmax(dim=1)
    assert torch.tensor(probabilities).double() == pytest.approx(wanted.numpy(), abs=2e-5)
    assert [row["class"] for row in rows] == [DIGITS[k] for k in wanted.argmax(dim=1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(wanted.max(dim=1).values.tolist(), abs=2e-5)


def test_few_predictions_are_a_table_and_many_are_csv(trained, folder, capsys):
    few = sorted((folder / "3").glob("*.png"))[:2]
    code, said, _ = command(capsys, "predict", trained, *few)
    assert code == 0
    assert said.count(str(few[0].name)) == 1
    assert "probability" in said
    code, said, _ = command(capsys, "predict", trained, folder)
    assert code == 0
    rows = list(csv.reader(io.StringIO(said)))
    assert rows[0][:3] == ["path", "class", "probability"]
    assert {len(row) for row in rows} == {13}
    assert len(rows) == 44


def test_file_names_that_are_not_valid_text_are_kept(trained, tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    path = root / b"caf\xe9, 1.png".decode("utf-8", "surrogateescape")
    Image.new("L", (8, 8), 7).save(str(path))
    out = tmp_path / "out.csv"
    assert command(capsys, "predict", trained, root, "-o", out)[0] == 0
    assert b"caf\xe9, 1.png" in out.read_bytes()
    code, said, _ = command(capsys, "predict", trained, root)
    assert code == 0
    assert "caf" in said
    assert command(capsys, "embed", trained, root, "-o", tmp_path / "out.npz")[0] == 0
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == [str(path)]


def test_mistakes_exit_with_2_and_one_line(trained, folder, tmp_path, capsys):
    used, empty = tmp_path / "used.npz", tmp_path / "empty"
    used.write_text("mine")
    empty.mkdir()
    out = tmp_path / "out.npz"
    cases = [
        (["embed", trained, folder, "-o", used], "exists already"),
        (["embed", trained, folder, "-o", tmp_path / "out.txt"], "written as .npz"),
        (["embed", trained, folder, "-o", tmp_path / "no/out.npz"], "make the folder first"),
        (["embed", trained, empty, "-o", out], "holds no images"),
        (["embed", trained, tmp_path / "gone.png", "-o", out], "does not exist"),
        (["embed", trained, folder, "-o", out, "--part", "classifier"], "see `hpc-supcon predict`"),
        (["embed", trained, folder, "-o", out, "--part", "head"], "unknown part 'head'"),
        (["embed", trained, folder, "-o", out, "--device", "gpu"], "unknown device 'gpu'"),
        (["embed", empty, folder, "-o", out], "not a run folder"),
        (["predict", trained, folder, "-o", tmp_path / "out.xlsx"], ".csv or .json"),
        (["predict", trained, folder, "--probe", "knn"], "no fitted knn probe in it (linear saved)"),
        (["predict", trained, folder, "--probe", "k"], "unknown probe 'k'"),
    ]
    for arguments, message in cases:
        code, _, err = command(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1), (arguments, err)
        assert message in err
    assert used.read_text() == "mine"
    assert not out.exists()
    assert command(capsys, "embed", trained, folder, "-o", used, "--force")[0] == 0
    assert np.load(used, allow_pickle=False)["embeddings"].shape == (43, 128)
