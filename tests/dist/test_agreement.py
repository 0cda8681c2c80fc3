"""The data of several ranks are compared, whether they are one set on a shared disk or copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hpc_supcon.checkpoint import Checkpoint
from hpc_supcon.data import ArraySource, Splits, convert_splits, fingerprint, load_splits
from hpc_supcon.errors import RanksDiffer
from hpc_supcon.training import agreement
from hpc_supcon.training.agreement import agreed_fingerprint, check_same_checkpoint
from tests.dist.ranks import run_ranks

from ..fault.test_agreement import make_images


def splits_in(root):
    return load_splits("image_folder", root=root, validation_fraction=0.2)


def agreed(rank, world_size, roots):
    """(the fingerprint as JSON, how many files this rank asked the disk for)."""
    asked = []
    original = agreement.file_sizes
    agreement.file_sizes = lambda paths: asked.append(len(paths)) or original(paths)
    return agreed_fingerprint(splits_in(roots[rank])).as_json(), sum(asked)


def test_ranks_that_share_a_disk_ask_it_once_for_each_file(tmp_path):
    root = make_images(tmp_path / "a", per_class=7)
    found = run_ranks(agreed, 3, [root] * 3)
    own = fingerprint(splits_in(root)).as_json()
    assert all(one == own for one, _ in found)
    assert sum(n for _, n in found) == 3 * (7 + 4)
    assert all(n for _, n in found)


def test_a_copy_is_asked_for_all_its_files(tmp_path):
    root = make_images(tmp_path / "a", per_class=7)
    shutil.copytree(root, tmp_path / "b")
    found = run_ranks(agreed, 2, [root, tmp_path / "b"])
    assert [one for one, _ in found] == [fingerprint(splits_in(root)).as_json()] * 2
    assert sum(n for _, n in found) == 0, "each rank took its own fingerprint"


def refused(rank, world_size, make, *args):
    with pytest.raises(RanksDiffer) as raised:
        agreed_fingerprint(make(rank, *args))
    return str(raised.value)


def pixels(rank):
    images = torch.arange(4 * 16, dtype=torch.uint8).view(4, 1, 4, 4)
    labels = torch.tensor([0, 1, 0, 1])
    source = ArraySource(images, labels, ("a", "b"))
    return Splits(ArraySource(images + (rank == 2), labels, ("a", "b")), None, source)


def beton(rank, folder):
    return load_splits("image_folder", beton=Path(folder) / str(rank) / "a.beton", validation_fraction=0)


def order(rank):
    source = ArraySource(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("ab", "ba")[rank])
    return Splits(source, None, source)


def test_every_rank_says_which_one_has_other_data(tmp_path):
    said = run_ranks(refused, 3, pixels)
    assert set(said) == {
        "rank 2 has other data than rank 0: other arrays of pixels in train; give all ranks the same data set "
        "(data.root may differ)"
    }
    assert "classes in another order: class 0 is b, not a" in run_ranks(refused, 2, order)[0]
    splits = splits_in(make_images(tmp_path / "images", per_class=7))
    for rank, quality in enumerate((90, 50)):
        (tmp_path / str(rank)).mkdir()
        convert_splits("image_folder", splits, tmp_path / str(rank) / "a.beton", jpeg_quality=quality)
    assert (
        "other .beton files in train; other .beton files in validation" in run_ranks(refused, 2, beton, tmp_path)[1]
    )


def read_another(rank, world_size):
    with pytest.raises(RanksDiffer, match="step-4: rank 1 read another checkpoint there than rank 0"):
        check_same_checkpoint(Checkpoint(Path("step-4"), {}, {}, {"files": {"a": rank}}))


def test_ranks_that_read_different_checkpoints():
    run_ranks(read_another, 2)
