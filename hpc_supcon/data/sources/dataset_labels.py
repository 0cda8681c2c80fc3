"""Labels and class names of torch Datasets, without reading the images where the dataset keeps labels apart."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ...errors import CorruptSample, DataError
from .listing import Note

IMAGES_ALONE = object()
"""In place of the label of an item that is an image alone."""
_COMPARED = 8
"""Items whose labels are compared with those that the dataset keeps apart."""


class Items(Protocol):
    """(image, label) by index, the label IMAGES_ALONE where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, Any]: ...


def labels_of(dataset: object, items: Items, name: str, note: Note | None = None) -> Tensor:
    """int64 [N], the label of every item, which may be below 0 or too large; see `check_range`.

    Those of `dataset.targets` or `dataset.labels` (also of subsets and concatenations) where a few items have the
    same; otherwise every item is read, once. name: of the dataset in messages. Raises DataError for an item without a
    label or with one that is no integer, CorruptSample.
    """
    n, kept = len(items), _kept_labels(dataset)
    if kept is not None and len(kept) == n and _agree(kept, items, name):
        return torch.from_numpy(kept)
    if note is not None:
        note(f"{name}: it keeps no list of labels (targets, labels), so all {n:,} items are read once for theirs")
    return torch.tensor([_label(items, i, name) for i in range(n)], dtype=torch.int64)


def _kept_labels(dataset: Any) -> npt.NDArray[np.int64] | None:
    """int64 [N]; None where the dataset keeps none, or what it keeps is not what its items have."""
    if isinstance(dataset, Subset):
        inner = _kept_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_kept_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[1], len(dataset)) if len(dataset.tensors) == 2 else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    candidates = (getattr(dataset, key, None) for key in ("targets", "labels"))
    return next((found for one in candidates if (found := _integers(one, len(dataset))) is not None), None)


def _integers(found: Any, n: int) -> npt.NDArray[np.int64] | None:
    if not isinstance(found, Tensor | np.ndarray | Sequence) or isinstance(found, str):
        return None
    try:
        array = np.asarray(found)
    except ValueError:  # lists of different lengths
        return None
    return array.reshape(n).astype(np.int64) if array.dtype.kind in "iu" and array.size == n > 0 else None


def _agree(kept: npt.NDArray[np.int64], items: Items, name: str) -> bool:
    compared = sorted({k * (len(kept) - 1) // (_COMPARED - 1) for k in range(_COMPARED)})
    try:
        return all(_label(items, i, name) == kept[i] for i in compared)
    except CorruptSample:  # the loader names such an image, or replaces it
        return True


def _label(items: Items, i: int, name: str) -> int:
    label = items[i][1]
    if label is IMAGES_ALONE:
        raise DataError(
            f"{name}: item {i} is an image without a label: return (image, label), or set data.labels=none"
        )
    try:
        return operator.index(label.item() if isinstance(label, np.ndarray) and label.size == 1 else label)
    except (TypeError, ValueError, RuntimeError):
        shown = f"{type(label).__name__} {str(label)[:40]!r}"
        raise DataError(
            f"{name}: the label of item {i} is no integer but of type {shown}: labels are 0, 1, 2 ... by class"
        ) from None


def class_names(dataset: Any, labels: Tensor, name: str) -> tuple[str, ...]:
    """`dataset.classes`, also of subsets and concatenations; otherwise the numbers 0 to the largest label."""
    found = _classes(dataset)
    if found is None:
        return tuple(map(str, range(max(int(labels.max()), 0) + 1)))
    names = tuple(", ".join(map(str, one)) if isinstance(one, tuple | list) else str(one) for one in found)
    if len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise DataError(f"{name}: two of its classes are called {twice!r}")
    return names


def _classes(dataset: Any) -> Sequence[Any] | None:
    if isinstance(dataset, Subset):
        return _classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        first, *others = [_classes(part) for part in dataset.datasets]
        return first if all(other == first for other in others) else None
    found = getattr(dataset, "classes", None)
    return found if isinstance(found, list | tuple) and found else None


def check_range(labels: Tensor, classes: Sequence[str], name: str) -> None:
    """Raise DataError for a label that is no index into the classes; the first one is named with its item."""
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{name}: the label of item {i} is {int(labels[i])}, but there are {len(classes)} classes, numbered 0 to "
            f"{len(classes) - 1}{'' if len(wrong) == 1 else f' (so are {len(wrong) - 1:,} more labels)'}"
        )
