"""Claims about the resident loader, loaders by name and their options."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.data import ArraySource, CropOptions, EvalOrder, LoaderOptions, TrainOrder, build_loader
from hpc_supcon.errors import ConfigError
from tests.unit.data.arrays import arrays


def resident(source, order, rank=0, world_size=1, seed=0):
    return build_loader("resident", source, order, seed=seed, rank=rank, world_size=world_size, device="cpu")


def test_a_batch_has_the_images_of_its_index():
    source = arrays()
    loader = resident(source, TrainOrder(len(source), 8), seed=4)
    batches = list(loader.epoch(2))
    assert len(batches) == loader.steps_per_epoch == 6
    for batch in batches:
        assert torch.equal(batch.images, torch.stack([source.read(int(i)) for i in batch.index]))
        assert torch.equal(batch.labels, source.labels[batch.index])
    index = torch.stack([batch.index for batch in batches])
    assert torch.equal(index, TrainOrder(50, 8).epoch(4, 2, 0, 1))


def test_an_epoch_from_step_k_is_the_rest_of_the_epoch():
    loader = resident(arrays(), TrainOrder(50, 8))
    whole = [batch.index for batch in loader.epoch(1)]
    for start in range(7):
        tail = [batch.index for batch in loader.epoch(1, start)]
        assert [i.tolist() for i in tail] == [i.tolist() for i in whole[start:]]
    with pytest.raises(ValueError, match="step 7 is not in an epoch of 6 steps"):
        next(loader.epoch(1, 7))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_batches_of_all_ranks_are_the_global_batch(world_size):
    source = arrays()
    one = resident(source, TrainOrder(50, 8)).epoch(0)
    ranks = [resident(source, TrainOrder(50, 8), r, world_size).epoch(0) for r in range(world_size)]
    for batch, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_evaluation_all_ranks_together_load_the_source(world_size):
    source = arrays(n=2 if world_size == 3 else 50)
    loaders = [resident(source, EvalOrder(len(source), 7), r, world_size) for r in range(world_size)]
    batches = [batch for loader in loaders for batch in loader.epoch(0)]
    assert torch.equal(torch.cat([batch.images for batch in batches]), source.stack())


def test_changing_a_batch_does_not_change_the_source():
    source = arrays()
    before = source.stack().clone()
    for batch in resident(source, TrainOrder(50, 50)).epoch(0):
        batch.images.zero_()
    assert torch.equal(source.stack(), before)


def test_a_closed_loader_yields_nothing():
    loader = resident(arrays(), TrainOrder(50, 8))
    in_progress = loader.epoch(0)
    next(in_progress)
    loader.close()
    assert list(in_progress) == []
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


def test_a_batch_that_cannot_be_divided_is_refused_before_decoding():
    class Undecodable(ArraySource):
        def stack(self):
            raise AssertionError("decoded")

    source = arrays()
    with pytest.raises(ConfigError, match="3 ranks: use 6 or 9"):
        resident(Undecodable(source.stack(), source.labels, source.classes), TrainOrder(50, 8), 0, 3)


def test_an_unknown_loader_error_lists_the_loaders():
    with pytest.raises(
        ConfigError,
        match=r"unknown data\.loader 'residnt'; did you mean 'resident'\? known: dali, ffcv, resident, torch",
    ):
        build_loader("residnt", arrays(), TrainOrder(50, 8), seed=0, rank=0, world_size=1, device="cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropOptions(views=0, image_size=8), "views >= 1"),
        (lambda: CropOptions(views=1, image_size=8, scale=(0.5, 0.2)), "crop_scale"),
        (lambda: CropOptions(views=1, image_size=8, ratio=(0.0, 2.0)), "crop_ratio"),
        (lambda: LoaderOptions(workers=0), r"data\.workers"),
        (lambda: LoaderOptions(timeout_s=float("nan")), r"data\.timeout_s"),
        (lambda: LoaderOptions(on_corrupt="ignore"), r"data\.on_corrupt"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
