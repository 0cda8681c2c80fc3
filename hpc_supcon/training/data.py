"""The data set of a run, from its configuration: splits, loaders, and which images share a batch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..data import (
    ArraySource,
    Columns,
    CropOptions,
    DataFingerprint,
    Loader,
    LoaderOptions,
    Note,
    Order,
    Source,
    Splits,
    bits_of,
    build_loader,
    build_order,
    check_depth,
    choose_loader,
    load_splits,
    open_source,
    pixel_dtype,
)
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import DataError
from ..losses import loss_spec
from ..terminal import warn
from .agreement import agreed_fingerprint


@dataclass(frozen=True)
class Data:
    """The data set of a run and how it is served."""

    splits: Splits
    loader: str
    """Name of the loader."""
    reason: str
    """Why that loader was chosen, for the user."""
    training: LoaderOptions
    evaluation: LoaderOptions
    """As `training`, but without random crops; images that do not decode are left out, not replaced."""
    fingerprint: DataFingerprint
    """Of the splits, taken before anything was decoded."""


def load_data(config: Config, runtime: Runtime) -> Data:
    """The data set. Collective. Raises ConfigError and DataError, the same on every rank; RanksDiffer where the ranks
    have not the same data.

    Where the loader keeps the data set in memory, every image is decoded here, so that damaged files are found
    before training starts.
    """
    data = config.data
    with propagate_errors():
        training = loader_options(config)
        splits = splits_of(config, check_hash=runtime.launch.local_rank == 0, note=warn if runtime.is_main else None)
    fingerprint = agreed_fingerprint(splits)
    name: str = data.loader
    reason = "as configured"
    if name == "auto":  # depends on free memory, which differs between nodes: all ranks take rank 0's choice
        name, reason = gather_objects(choose_loader(splits.train, runtime.device, training))[0]
    if name == "resident" and data.on_corrupt == "fail":
        with propagate_errors():
            validation = None if splits.validation is None else _decoded(splits.validation)
            test = None if splits.test is None else _decoded(splits.test)
            splits = Splits(_decoded(splits.train), validation, test)
    return Data(splits, name, reason, training, training.for_evaluation(), fingerprint)


def splits_of(config: Config, *, check_hash: bool = False, note: Note | None = None) -> Splits:
    """The splits that a configuration describes; arguments and errors as of load_splits."""
    data = config.data
    return load_splits(
        data.source,
        root=data.root,
        download=data.download,
        image_size=data.image_size,
        channels=data.channels,
        exif=data.exif,
        labels=data.labels,
        columns=Columns(**data.columns.model_dump()),
        image_root=data.image_root,
        validation_fraction=data.validation_fraction,
        train_images=data.train_images,
        seed=config.seed,
        synthetic=data.synthetic.model_dump() if data.source == "synthetic" else None,
        beton=data.beton,
        check_hash=check_hash,
        note=note,
        arguments=data.options,
    )


def open_ood(config: Config, splits: Splits) -> dict[str, Source]:
    """The test split of each data set of `probe.ood`, converted to the size and channels of the run's images.

    Raises DataError where one is missing or damaged, or has another depth.
    """
    data, made, dtype = config.data, config.data.synthetic, pixel_dtype(splits.train)
    generated = {"images": made.images, "classes": made.classes, "bits": bits_of(dtype)}
    found: dict[str, Source] = {}
    for text, name, root in config.probe.ood_sets:
        try:
            found[text] = open_source(
                name,
                data.root if root is None else root,
                download=data.download,
                image_size=splits.image_size,
                channels=splits.channels,
                exif=data.exif,
                synthetic=generated if name == "synthetic" else None,
            ).labeled_test
            check_depth(pixel_dtype(found[text]), dtype)
        except DataError as error:
            raise DataError(f"probe.ood={text}: {error} (in probe.ood, the folder follows a colon)") from None
    return found


def loader_options(config: Config) -> LoaderOptions:
    """Options of the training loader."""
    data, augment = config.data, config.augment
    crop = None
    if data.crop_while_decoding:
        assert data.image_size is not None  # see config.check
        crop = CropOptions(data.views_per_image, data.image_size, augment.crop_scale, augment.crop_ratio)
    return LoaderOptions(data.workers, data.timeout_s, data.on_corrupt, crop)


def check_classes_suffice(config: Config, splits: Splits) -> None:
    """Raise DataError for images of one class only, where the loss or the probe of validation tells classes apart."""
    specs = {name: loss_spec(name) for name in config.loss.weights}
    for name, spec in specs.items():
        if spec.uses_labels and (config.loss.supervised or not spec.pairwise):
            splits.check_two_classes(f"loss {name}")
    if config.validation.enabled and config.validation.probe.kind != "none":
        splits.check_two_classes(f"validation.probe.kind={config.validation.probe.kind}")


def build_training_loader(config: Config, data: Data, runtime: Runtime) -> Loader:
    """This rank's loader of the training split. Raises ConfigError, DataError, and what the loader raises."""
    order = build_training_order(config, data.splits)
    loader = build_loader(
        data.loader,
        data.splits.train,
        order,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=data.training,
    )
    _check_batches(config, order, data.splits)
    return loader


def build_training_order(config: Config, splits: Splits) -> Order:
    data = config.data
    return build_order(
        data.sampler,
        splits.train.labels,
        splits.classes,
        data.batch_size,
        classes_per_batch=data.classes_per_batch,
        images_per_class=data.images_per_class,
        long_tail_alpha=data.long_tail_alpha,
    )


def _check_batches(config: Config, order: Order, splits: Splits) -> None:
    """Raise DataError when a batch of the first epoch has no two images of one class, and the loss needs pairs."""
    if config.data.views_per_image > 1 or not any(loss_spec(term).needs_pairs for term in config.loss.weights):
        return
    labels = splits.train.labels[order.epoch(config.seed, 0, 0, 1)].sort(dim=1).values
    all_different = (labels[:, 1:] != labels[:, :-1]).all(dim=1)
    if all_different.any():
        raise DataError(
            f"data.views=1 and no class repeats within batch {int(all_different.nonzero()[0])} of "
            f"data.batch_size={config.data.batch_size}: no image has a positive; use data.views=2 or a larger batch"
        )


def _decoded(source: Source) -> ArraySource:
    if isinstance(source, ArraySource):
        return source
    return ArraySource(source.stack(), source.labels, source.classes, source.paths)
