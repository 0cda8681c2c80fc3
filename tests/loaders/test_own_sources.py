"""Every loader of image files serves the same images, whatever holds the files: folders, tables, data sets, tars."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hpc_supcon.data import EvalOrder, Source, TrainOrder, build_loader, load_splits
from hpc_supcon.data.loaders import CropOptions, LoaderOptions

from .contract import write_folder

SIZE, BATCH = 16, 6
CROP = CropOptions(views=2, image_size=8)
KINDS = ["manifest", "huggingface", "webdataset", "datasets"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), suffix="jpg")


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory) -> dict[str, Source]:
    """The training images of one folder, in the same order, by what holds them."""
    root = tmp_path_factory.mktemp("held")
    splits = load_splits("image_folder", root=folder, image_size=SIZE, validation_fraction=0)
    found = {"image_folder": splits.train}
    lines = ["path,label,split"]
    for name, source in (("train", splits.train), ("test", splits.test)):
        lines += [f"{p},{splits.classes[y]},{name}" for p, y in zip(source.paths, source.labels, strict=True)]
    (root / "all.csv").write_text("\n".join(lines))
    roots = {"manifest": root / "all.csv"}
    if find_spec("datasets"):
        roots["huggingface"] = save_dataset(splits, root / "saved")
    if find_spec("webdataset"):
        roots["webdataset"] = save_tars(splits, root / "tars")
    options = {"image_size": SIZE, "validation_fraction": 0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(root / "cache"))
        found |= {name: load_splits(name, root=place, **options).train for name, place in roots.items()}
    from torchvision.datasets import ImageFolder

    own = {split: ImageFolder(str(folder / split)) for split in ("train", "test")}
    return found | {"datasets": load_splits("own", datasets=own, **options).train}


def save_dataset(splits, root):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(splits.classes))}
    )
    found = {
        name: datasets.Dataset.from_dict(
            {"image": [str(path) for path in source.paths], "label": source.labels.tolist()}, features
        )
        for name, source in (("train", splits.train), ("test", splits.test))
    }
    datasets.DatasetDict(found).save_to_disk(str(root))
    return root


def save_tars(splits, root):
    import webdataset

    root.mkdir()
    for name, source in (("train", splits.train), ("test", splits.test)):
        with webdataset.ShardWriter(f"{root}/{name}-%d.tar", maxcount=10, verbose=0) as tars:
            for i, path in enumerate(source.paths):
                label = splits.classes[source.labels[i]]
                tars.write({"__key__": f"{i:04d}", "jpg": path.read_bytes(), "cls": label})
    return root


def serve(source, name, crop):
    order = TrainOrder(len(source), BATCH) if crop else EvalOrder(len(source), BATCH)
    options = LoaderOptions(workers=2, timeout_s=300, crop=crop)
    loader = build_loader(name, source, order, seed=5, rank=0, world_size=1, device="cpu", options=options)
    try:
        return [(b.images, b.labels, b.index) for b in loader.epoch(1)]
    finally:
        loader.close()


@pytest.mark.parametrize("crop", [None, CROP])
@pytest.mark.parametrize("loader", ["resident", "torch", "dali"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_images_are_those_of_the_folder(sources, kind, loader, crop):
    if kind not in sources:
        pytest.skip(f"NOT CHECKED: the package of data.source={kind} is not installed")
    if loader == "dali" and (kind == "datasets" or not find_spec("nvidia.dali")):
        pytest.skip("NOT CHECKED: DALI is not installed, or items are no files")
    expected, found = (serve(sources[name], loader, crop) for name in ("image_folder", kind))
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
