"""What sources in tables have in common: names of splits, and labels of any type by which images are told apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import DataError
from .listing import Note

T = TypeVar("T")

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""How data sets call their splits, in lower case -> the split."""
_NUMBER = re.compile(r"-?\d+")
_SHOWN = 3


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None: they are found by their usual names, or by their type."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


def arranged(found: Mapping[str, T]) -> tuple[T, T | None, T | None]:
    """(train, validation or None, test or None); where only one of the last two exists, it is the test set."""
    validation, test = found.get("validation"), found.get("test")
    return (found["train"], None, validation) if test is None else (found["train"], validation, test)


def rows_named(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3, 5, 8 and 12 more`; counted from 1."""
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(str(i + 1) for i in rows[:_SHOWN])}{more}"


def numbered_labels(
    values: Mapping[str, Sequence[str | int | None]],
    where: Callable[[str, Sequence[int]], str],
    note: Note | None = None,
    order: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """(classes, labels int64 [N] by split) of the label of every image, as text or numbers.

    Classes are the labels that train has, as text, in the order of their numbers where all are integers, otherwise of
    their characters; `order` gives another one. where: names images of a split by their indices, for messages. note:
    receives a line for each split that lacks classes. Raises DataError for a label that is empty, or that no training
    image has.
    """
    texts = {split: [_text(value) for value in column] for split, column in values.items()}
    for split, column in texts.items():
        if empty := [i for i, text in enumerate(column) if text == ""]:
            raise DataError(f"{where(split, empty)}: the label is empty: add one, or remove the image")
    found = set(texts["train"])
    is_number = all(_NUMBER.fullmatch(text) for text in found)
    if order is None:
        order = sorted(found, key=lambda text: (int(text), text) if is_number else (0, text))
    classes = tuple(text for text in order if text in found)
    numbers = {text: number for number, text in enumerate(classes)}
    labels = {}
    for split, column in texts.items():
        if extra := [i for i, text in enumerate(column) if text not in numbers]:
            raise DataError(
                f"{where(split, extra)}: no training image has the label {column[extra[0]]!r}: add some to train, or "
                f"remove these from {split}"
            )
        labels[split] = torch.tensor([numbers[text] for text in column], dtype=torch.int64)
        absent = len(classes) - len(labels[split].unique())
        if absent and note is not None:
            note(
                f"the {split} split has no image of {absent} of {len(classes)} classes; its scores are averages over "
                "the others"
            )
    return classes, labels


def _text(value: str | int | None) -> str:
    return "" if value is None else str(value).strip()
