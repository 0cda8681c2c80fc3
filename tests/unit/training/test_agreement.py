"""When a run may be resumed on data that changed: where its order can still be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.data import DataFingerprint
from hpc_supcon.data.fingerprint import FILES, SplitFingerprint
from hpc_supcon.errors import DataChanged
from hpc_supcon.training.agreement import check_unchanged, versions

WHERE = Path("r/checkpoints/step-5")
ALLOW = "data.allow_change=true"


def data(counts=(30, 13), labels="l", classes=("a", "b")):
    return DataFingerprint(FILES, classes, {"train": SplitFingerprint(counts, labels, "n", "s", "c")})


def checked(now, *overrides, step=5, before=None, heads=("projection",), record=True):
    """batches of 10: an epoch of the 43 images has 4 steps."""
    before = before or data()
    state = {"step": step, "classes": list(before.classes), "heads": list(heads)}
    state |= {"data": before.as_json()} if record else {}
    return check_unchanged(load_config("default", ["data.batch_size=10", *overrides]), state, now, WHERE)


def test_the_same_data_are_not_told():
    assert checked(data()) is None


def test_a_checkpoint_without_a_record_goes_on_with_a_line_but_not_with_other_classes():
    assert "without a record of its data" in checked(data(counts=(1, 1)), record=False)
    with pytest.raises(DataChanged, match="class added: c"):
        checked(data(counts=(30, 13, 5), classes=("a", "b", "c")), record=False)


def test_at_the_end_of_an_epoch_the_number_of_images_may_change_by_less_than_a_step():
    assert "5 images more in train (48, not 43" in checked(data(counts=(30, 18)), ALLOW, step=8)
    with pytest.raises(DataChanged, match="step 5 is in the middle of an epoch, whose order is that of 43 images"):
        checked(data(counts=(30, 18)), ALLOW)
    with pytest.raises(DataChanged, match="an epoch had 4 steps and would have 5"):
        checked(data(counts=(30, 20)), ALLOW, step=8)


@pytest.mark.parametrize("sampler", ["class_balanced", "long_tail_aware"])
def test_where_the_order_follows_from_the_labels_they_may_not_change_within_an_epoch(sampler):
    settings = [ALLOW, f"data.sampler={sampler}", "data.classes_per_batch=2", "data.images_per_class=5"]
    moved = data(counts=(31, 12), labels="other")
    with pytest.raises(DataChanged, match=f"whose order is of the earlier labels .data.sampler={sampler}."):
        checked(moved, *settings)
    assert checked(moved, *settings, step=8)
    assert checked(moved, ALLOW), "the random order does not"


def test_a_classifier_keeps_its_classes():
    renamed = data(classes=("a", "c"))
    assert "class added: c; class missing: b" in checked(renamed, ALLOW)
    with pytest.raises(DataChanged, match="its classifier has an output for each of the earlier classes"):
        checked(renamed, ALLOW, heads=("projection", "classifier"))
    swapped = data(classes=("b", "a"))
    with pytest.raises(DataChanged, match="classes in another order: class 0 is b, not a"):
        checked(swapped)


def test_files_of_another_content_are_told():
    split = data().splits["train"]
    now = replace(data(), splits={"train": replace(split, content="x")})
    with pytest.raises(DataChanged, match="files of another content in train; bring the data back"):
        checked(now)
    assert "going on with them" in checked(now, ALLOW)


def test_all_packages_that_the_results_follow_from_are_compared():
    assert set(versions()) == {"hpc-supcon", "torch", "torchvision", "timm", "numpy", "pillow"}
