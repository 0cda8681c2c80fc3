"""Images of an evaluated split that do not decode: left out and counted, as if they were not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, LoaderOptions, Splits, TrainOrder, build_loader
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import CorruptSample
from hpc_supcon.evaluation.features import SplitRows, read_indexed
from hpc_supcon.evaluation.left_out import tell_left_out
from hpc_supcon.evaluation.monitor import monitor
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.stages.probe import probe
from hpc_supcon.stages.reconstruct import evaluate_autoencoder
from hpc_supcon.training.build import build_training
from hpc_supcon.training.data import load_data
from hpc_supcon.training.validation import build_validate
from tests.data.odd_images import cut, jpeg, picture
from tests.dist.ranks import run_ranks
from tests.dist.test_step import in_memory

SETTINGS = [
    "data.source=image_folder", "data.image_size=8", "data.batch_size=4", "model.encoder=conv", "data.workers=1",
    "model.projection_hidden=16", "model.projection_dim=8", "train.iterations=2", "log.tensorboard=false",
    "log.progress=false", "checkpoint.every_epochs=null", "runtime.threads=1", "data.on_corrupt=replace",
    "loss.terms={supcon_out: 1.0, reconstruction: 1.0}", "probe.kind=[linear, knn, finetune]", "probe.knn.k=3",
    "probe.corruptions=contrast",
    "probe.linear={epochs: 2, lrs: [0.01], batch_size: 4}", "probe.finetune={epochs: 2, batch_size: 4}",
]  # fmt: skip
DAMAGED = ("val/a/2.jpg", "test/b/3.jpg", "test/b/4.jpg")  # uneven: both of test are in the last rank's share


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """(images, run): a folder in which test and validation images are damaged, and a run that was trained on it."""
    root = tmp_path_factory.mktemp("left out")
    for split, count in {"train": 4, "val": 3, "test": 5}.items():
        for name in "ab":
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                path = root / "images" / split / name / f"{i}.jpg"
                picture(12, 12, seed=len(list(root.rglob("*.jpg")))).save(path)
    for path in DAMAGED:
        (root / "images" / path).write_bytes(cut(jpeg(), 0.5))
    evaluated(0, 1, root / "images", root / "run", train=True)
    return root / "images", root / "run"


def evaluated(rank, world_size, images, folder, train=False, loader="resident"):
    """The entries of results.json, on these ranks."""
    settings = [*SETTINGS, f"data.root={images}", f"run_dir={folder}", f"data.loader={loader}"]
    config = load_config("default", settings)
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    data = load_data(config, runtime)
    if train:
        pretrain(config, runtime, data)
        return None
    results = [*probe(Path(folder), config, runtime, data), evaluate_autoencoder(Path(folder), config, runtime, data)]
    return json.loads(json.dumps([{k: v for k, v in result.items() if k != "seconds"} for result in results]))


def copied(run_folder, target):
    return shutil.copytree(run_folder, target)


@pytest.mark.parametrize("world_size", [1, 2])
def test_damaged_images_are_left_out_of_every_score_and_counted(run_folder, tmp_path, world_size):
    images, run = run_folder
    got = run_ranks(evaluated, world_size, images, copied(run, tmp_path / "run"))
    check_that_predictions_are_of_the_others(tmp_path / "run", images)
    assert all(results == got[0] for results in got)
    without = shutil.copytree(images, tmp_path / "without")
    for path in DAMAGED:
        (without / path).unlink()
    want = evaluated(0, 1, without, copied(run, tmp_path / "other"))
    for result, expected in zip(got[0], want, strict=True):
        assert result.pop("left_out") == {"test": 2, "validation": 1}
        assert "left_out" not in expected
        if result["probe"] == "finetune" and world_size > 1:
            continue  # on two ranks its training rounds otherwise
        for split in result.keys() & {"train", "validation", "test"}:
            assert result[split] == pytest.approx(expected[split], rel=1e-5), (result["probe"], split)


def check_that_predictions_are_of_the_others(folder, images):
    for kind in ("linear", "knn", "finetune"):
        for split, name, left_out in (("validation", "val", [2]), ("test", "test", [8, 9])):
            files = sorted(path.relative_to(images).as_posix() for path in (images / name).glob("?/*.jpg"))
            want = [(i, path) for i, path in enumerate(files) if i not in left_out]
            assert [path for i, path in enumerate(files) if i in left_out] == [p for p in DAMAGED if name in p]
            rows = predictions_of(folder, kind, split)
            assert [(row["index"], row["path"]) for row in rows] == want
            assert [row["label"] for row in rows] == ["ab".index(path.split("/")[1]) for _, path in want]


def predictions_of(folder, kind, split):
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return [row for row in rows if (row["probe"], row["split"]) == (kind, split)]


def test_images_that_were_decoded_in_advance_keep_their_paths(run_folder, tmp_path):
    images, _ = run_folder
    whole = shutil.copytree(images, tmp_path / "whole")
    for path in DAMAGED:
        (whole / path).unlink()
    settings = [*SETTINGS, f"data.root={whole}", "data.loader=resident", "data.on_corrupt=fail"]
    splits = load_data(load_config("default", settings), Runtime(Launch(), torch.device("cpu"))).splits
    assert isinstance(splits.test, ArraySource)
    want = sorted((whole / "test").glob("?/*.jpg"))
    assert list(splits.test.paths) == want
    assert list(splits.test.subset([3, 0]).paths) == [want[3], want[0]]
    assert load_data(load_config("quickstart"), Runtime(Launch(), torch.device("cpu"))).splits.test.paths is None


def test_rank_0_tells_once_how_many_were_left_out_of_each_split(capsys):
    splits = Splits(images(4), images(6), images(10))
    results = [{"left_out": {"test": 2, "validation": 1}}, {}, {"left_out": {"test": 2}}]
    for rank in (0, 1):
        tell_left_out(results, splits, Runtime(Launch(rank=rank, world_size=2), torch.device("cpu")))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "2 of 10 test images cannot be decoded and are left out",
        "1 of 6 validation images cannot be decoded and are left out",
    ]


def test_a_damaged_test_image_is_an_error_by_name_where_the_policy_is_fail(run_folder, tmp_path, monkeypatch):
    images, run = run_folder
    monkeypatch.setattr(f"{__name__}.SETTINGS", [*SETTINGS, "data.on_corrupt=fail"])
    for loader in ("resident", "torch"):
        with pytest.raises(CorruptSample, match=r"val/a/2\.jpg does not decode"):
            evaluated(0, 1, images, copied(run, tmp_path / loader), loader=loader)


class Holes(ArraySource):
    """Images at these indices do not decode."""

    holes: tuple[int, ...] = ()

    def read(self, i):
        if i in self.holes:
            raise CorruptSample(f"image {i} does not decode")
        return super().read(i)

    def stack(self):
        for i in self.holes:
            self.read(i)
        return super().stack()


def images(n, holes=()):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    source = Holes(pixels, torch.arange(n) * 3 // n, ("a", "b", "c"))
    source.holes = tuple(holes)
    return source


def validated(rank, world_size, overrides, holes, n):
    """Validation of a new model on n images with holes; the same for those of its global batch that decode."""
    more = ["data.source=synthetic", "validation.every_epochs=1", "augment.policy=none", "loss.temperature=0.3"]
    names = ("data.source", "data.image_size", "loss.terms", "data.on_corrupt", "data.batch_size")
    kept = [setting for setting in SETTINGS if not setting.startswith(names)]
    config = load_config("default", [*kept, *more, f"data.batch_size={n}", *overrides])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    evaluation = LoaderOptions(on_corrupt="leave_out")
    damaged = Splits(images(n), images(n, holes), images(n))
    data = replace(in_memory(Splits(images(n), images(n), images(n))), splits=damaged, evaluation=evaluation)
    training = build_training(config, data, runtime)
    return build_validate(config, data, training, runtime, None)()


@pytest.mark.parametrize("loss", ["loss.terms={cross_entropy: 1.0, reconstruction: 0.3}", "loss.name=supcon_out"])
def test_validation_is_that_of_the_other_images_on_any_number_of_ranks(loss):
    n = 8
    order = TrainOrder(n, n).epoch(0, 0, 1, 2)[0]
    holes = order.tolist()[:3]  # three of the four images of rank 1's part of the shuffled batch
    one = validated(0, 1, [loss], holes, n)
    assert one.pop("left_out") == 3
    for numbers in run_ranks(validated, 2, [loss], holes, n):
        assert numbers.pop("left_out") == 3
        assert numbers == pytest.approx(one, rel=1e-5)
    assert one != pytest.approx(validated(0, 1, [loss], [], n), rel=1e-3)


def test_a_rank_without_an_image_that_decodes_takes_part_in_validation():
    n = 8
    holes = TrainOrder(n, n).epoch(0, 0, 1, 2)[0].tolist()
    numbers = run_ranks(validated, 2, ["loss.name=supcon_out"], holes, n)
    assert numbers[0] == numbers[1]
    assert numbers[0] == pytest.approx(validated(0, 1, ["loss.name=supcon_out"], holes, n), rel=1e-5)


def test_the_online_probe_leaves_them_out_of_bank_and_queries():
    runtime = Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))
    options = {"k": 2, "options": LoaderOptions(on_corrupt="leave_out")}
    train, other = images(9, [0, 4]), images(9, [1, 2, 3])

    class Pixels(torch.nn.Flatten):
        feature_dim = 192

    def subset(source):
        return source.subset([i for i in range(9) if i not in source.holes])

    def run(*sources):
        return monitor(Pixels(), *sources, lambda x: x.float(), runtime, **options)

    assert run(train, other) == run(subset(train), subset(other))
    with pytest.raises(CorruptSample, match=r"k=2 neighbors, but only 1 training images decode"):
        run(images(9, range(8)), other)
    with pytest.raises(CorruptSample, match="none of the 9 images decodes"):
        run(train, images(9, range(9)))


def test_a_split_of_which_no_image_decodes_is_named():
    runtime = Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))
    options = LoaderOptions(on_corrupt="leave_out")
    splits = Splits(images(5, [2]), None, images(5, range(5)))
    rows = SplitRows(splits, lambda source, kind: read_indexed(source, runtime, options=options)[:2])
    assert rows.gathered("train", "pixels")[1].tolist() == splits.train.labels[[0, 1, 3, 4]].tolist()
    assert rows.left_out == {"train": 1}
    with pytest.raises(CorruptSample, match="none of the 5 images decodes"):
        rows.local("test", "pixels")


@pytest.mark.parametrize("name", ["resident", "torch"])
def test_loaders_leave_out_exactly_the_corrupt_images(name):
    source, options = images(9, [3, 4, 5, 8]), LoaderOptions(on_corrupt="leave_out", workers=1)
    order = TrainOrder(9, 3)
    loader = build_loader(name, source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    batches = list(loader.epoch(0))
    loader.close()
    want = [[i for i in step if i not in source.holes] for step in order.epoch(0, 0, 0, 1).tolist()]
    assert [batch.index.tolist() for batch in batches] == want
    assert loader.replaced == 0
    for batch in batches:
        assert torch.equal(batch.images, ArraySource.stack(source)[batch.index])
        assert torch.equal(batch.labels, source.labels[batch.index])
