"""Claims about every sampler: which images share a batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_supcon import cli
from hpc_supcon.data import SAMPLERS, ArraySource, LongTailAware, TrainOrder, build_loader, build_order
from hpc_supcon.data.samplers import ClassBalanced
from hpc_supcon.errors import ConfigError, DataError

SIZES = (40, 7, 23, 11, 31, 8)
NAMES = tuple("abcdef")


def labels_of(*sizes: int) -> torch.Tensor:
    """sizes[c] labels of each class c, shuffled."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(sum(sizes)))]


def order_of(sampler: str, labels: torch.Tensor, batch_size: int = 24, **settings):
    given = {"classes_per_batch": 4, "images_per_class": 6, "long_tail_alpha": 0.5} | settings
    return build_order(sampler, labels, NAMES, batch_size, **given)


# ---- every sampler


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_parts_of_all_ranks_are_the_global_batch_of_one_process(sampler, world_size):
    order = order_of(sampler, labels_of(*SIZES))
    one = order.epoch(5, 2, 0, 1)
    ranks = [order.epoch(5, 2, rank, world_size) for rank in range(world_size)]
    assert one.dtype == torch.int64
    assert one.shape == (sum(SIZES) // 24, 24)
    assert order.steps(0, world_size) == len(one)
    assert order.n == sum(SIZES)
    assert torch.equal(torch.cat(ranks, dim=1), one)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_image_occurs_twice_in_a_global_batch(sampler):
    order = order_of(sampler, labels_of(*SIZES))
    for epoch in range(40):
        for batch in order.epoch(0, epoch, 0, 1):
            assert len(batch.unique()) == 24


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_order_depends_on_seed_and_epoch_and_on_nothing_else(sampler):
    order = order_of(sampler, labels_of(*SIZES))
    first = order.epoch(1, 0, 0, 1)
    torch.rand(3)
    assert torch.equal(first, order.epoch(1, 0, 0, 1))
    for other in ((1, 1), (0, 1), (2, 0)):
        assert not torch.equal(first, order.epoch(*other, 0, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_loader_resumes_in_the_middle_of_an_epoch(sampler):
    labels = labels_of(*SIZES)
    source = ArraySource(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, NAMES)
    order = order_of(sampler, labels)
    loader = build_loader("resident", source, order, seed=3, rank=1, world_size=2, device="cpu")
    rest = [batch.index for batch in loader.epoch(1, start=2)]
    assert torch.equal(torch.stack(rest), order.epoch(3, 1, 1, 2)[2:])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_image_occurs_within_a_few_epochs(sampler):
    order = order_of(sampler, labels_of(*SIZES))
    used = torch.cat([order.epoch(0, epoch, 0, 1).flatten() for epoch in range(30)])
    assert len(used.unique()) == sum(SIZES)


def test_the_random_sampler_is_train_order():
    order = order_of("random", labels_of(*SIZES))
    assert torch.equal(order.epoch(4, 1, 0, 2), TrainOrder(sum(SIZES), 24).epoch(4, 1, 0, 2))


# ---- class_balanced


@pytest.mark.parametrize(("classes_per_batch", "images_per_class"), [(4, 6), (6, 4), (1, 7), (5, 2)])
def test_every_batch_has_images_per_class_of_classes_per_batch(classes_per_batch, images_per_class):
    labels = labels_of(*SIZES)
    order = order_of(
        "class_balanced",
        labels,
        classes_per_batch * images_per_class,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
    )
    visits = torch.zeros(6)
    for batch in order.epoch(0, 0, 0, 1):
        counts = torch.bincount(labels[batch], minlength=6)
        assert sorted(counts.tolist()) == [0] * (6 - classes_per_batch) + [images_per_class] * classes_per_batch
        visits += counts > 0
    assert visits.max() - visits.min() <= 1, "classes occur equally often"


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_equally_many_images_of_a_class(world_size):
    labels = labels_of(*SIZES)
    order = order_of("class_balanced", labels)
    for rank in range(world_size):
        for part in order.epoch(0, 0, rank, world_size):
            assert set(torch.bincount(labels[part]).tolist()) - {0} == {6 // world_size}


def test_all_images_of_a_class_are_used_before_one_is_repeated():
    labels = labels_of(*[13] * 6)
    used = order_of("class_balanced", labels).epoch(0, 0, 0, 1).flatten()
    assert len(used) == 72
    for c in range(6):
        counts = torch.bincount(used, minlength=78)[labels == c]
        assert counts.max() - counts.min() <= 1


def test_classes_without_images_are_left_out():
    order = order_of("class_balanced", labels_of(20, 0, 20, 0, 20, 20))
    assert order.epoch(0, 0, 0, 1).shape == (3, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images_per_class": 5}, r"classes_per_batch=4 times data\.images_per_class=5 is 20, not .*batch_size=24"),
        ({"classes_per_batch": 8, "images_per_class": 3}, "classes_per_batch=8, but .* only 6 classes"),
        ({"classes_per_batch": 3, "images_per_class": 8}, "images_per_class=8, but class 'b' has only 7 images"),
        ({"classes_per_batch": None}, "needs data.classes_per_batch and data.images_per_class"),
    ],
)
def test_settings_that_fit_no_balanced_batch_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        order_of("class_balanced", labels_of(*SIZES), **settings)


# ---- long_tail_aware


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_classes_are_drawn_in_proportion_to_a_power_of_their_size(alpha):
    sizes = (4000, 1600, 500, 200, 150, 100)
    labels = labels_of(*sizes)
    order = LongTailAware(labels, 64, alpha=alpha)
    drawn = torch.bincount(labels[torch.cat([order.epoch(0, e, 0, 1).flatten() for e in range(5)])], minlength=6)
    total = int(drawn.sum())
    weights = torch.tensor(sizes, dtype=torch.float64) ** alpha
    expected = total * weights / weights.sum()
    assert ((drawn - expected).abs() < 5 * expected.sqrt()).all(), (drawn, expected)


def test_a_batch_is_full_and_repeats_no_image_of_a_small_class():
    labels = labels_of(100, 2, 3, 30, 1, 5)
    for batch in LongTailAware(labels, 64, alpha=0.0).epoch(0, 0, 0, 1):
        assert len(batch.unique()) == 64
        counts = torch.bincount(labels[batch], minlength=6)
        assert (counts <= torch.tensor([100, 2, 3, 30, 1, 5])).all()
        assert counts[[1, 2, 4]].tolist() == [2, 3, 1], "all images of the smallest classes"


def test_a_batch_as_large_as_the_set_has_every_image_once():
    order = LongTailAware(labels_of(*SIZES), sum(SIZES), alpha=0.3)
    assert torch.equal(order.epoch(0, 0, 0, 1)[0].sort().values, torch.arange(sum(SIZES)))


def test_classes_are_mixed_within_a_batch():
    labels = labels_of(300, 300)
    order = LongTailAware(labels, 60, alpha=1.0)
    shares = torch.stack([labels[order.epoch(0, 0, rank, 2)].float().mean() for rank in range(2)])
    assert ((shares - 0.5).abs() < 5 / math.sqrt(300) / 2).all()


def test_alpha_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"data\.long_tail_alpha must be within 0\.\.1, not 1\.5"):
        order_of("long_tail_aware", labels_of(*SIZES), long_tail_alpha=1.5)


# ---- any classes


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_any_class_sizes_give_full_batches_without_duplicates(sizes, alpha, seed, data):
    labels, present = labels_of(*sizes), [size for size in sizes if size]
    batch_size = data.draw(st.integers(1, len(labels)))
    orders = [LongTailAware(labels, batch_size, alpha=alpha)]
    images_per_class = data.draw(st.integers(1, min(present)))
    classes_per_batch = data.draw(st.integers(1, len(present)))
    orders.append(
        ClassBalanced(
            labels,
            [str(c) for c in range(len(sizes))],
            images_per_class * classes_per_batch,
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
        )
    )
    for order in orders:
        batches = order.epoch(seed, 0, 0, 1)
        assert batches.shape == (len(labels) // order.batch_size, order.batch_size)
        assert all(len(batch.unique()) == order.batch_size for batch in batches)


# ---- errors of every sampler, and training by name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_that_cannot_be_divided_or_filled_is_an_error(sampler):
    with pytest.raises(ConfigError, match=r"data\.batch_size=24 .* 5 ranks: use 20 or 25"):
        order_of(sampler, labels_of(*SIZES)).epoch(0, 0, 0, 5)
    with pytest.raises(DataError, match=r"20 images, fewer than one batch of data\.batch_size=24"):
        order_of(sampler, labels_of(10, 10))
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        order_of(sampler, labels_of(10, 10), 0)


def test_an_unknown_sampler_error_suggests_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown data\.sampler 'class_balance'; did you mean 'class_balanced'"):
        order_of("class_balance", labels_of(*SIZES))


TINY = [
    "data.source=synthetic", "data.synthetic={images: 64, classes: 4, channels: 3, image_size: 8}",
    "data.batch_size=12", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=2", "log.tensorboard=false", "runtime.threads=1",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.sampler=class_balanced", "data.classes_per_batch=3", "data.images_per_class=4"],
        ["data.sampler=long_tail_aware", "augment.policy=randaugment", "augment.randaugment.operations=1"],
        ["augment.policy=autoaugment", "augment.autoaugment=svhn", "train.micro_batch_size=5"],
    ],
)
def test_training_runs_with_each_sampler_and_policy(tmp_path, capsys, overrides):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "default", *TINY, *overrides, f"run_dir={tmp_path}/run"])
    assert not stopped.value.code, capsys.readouterr().err
    assert list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sampler=balanced", "unknown data.sampler 'balanced'"),
        ("data.sampler=class_balanced", "needs data.classes_per_batch"),
        ("augment.policy=sim", "unknown augment.policy 'sim'"),
        ("augment.randaugment.magnitude=31", "augment.randaugment.magnitude"),
        ("data.long_tail_alpha=2", "data.long_tail_alpha"),
    ],
)
def test_a_wrong_name_or_number_stops_before_the_run_folder_is_made(tmp_path, capsys, override, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "default", *TINY, override, f"run_dir={tmp_path}/run"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
