"""The error of one rank reaches the terminal and the run folder, with its rank, and ends the others with its name."""

from __future__ import annotations

import pytest

from hpc_supcon.errors import CorruptSample, RankLost

from .runs import Run

CORRUPT = "image train/[cat]/7.png does not decode"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_damaged_file_on_one_rank_is_named_once_and_every_rank_ends_with_its_exit_code(tmp_path, rank):
    it = Run(3, tmp_path / "r", fault=f"corrupt@rank={rank},step=9")
    assert it.end() == [CorruptSample.exit_code] * 3, it.stderr
    assert it.stderr.count(CORRUPT) == 1, it.stderr
    assert f"hpc-supcon: error: rank {rank}: {CORRUPT}" in it.stderr
    assert "was lost" not in it.stderr
    assert "Traceback" not in it.stderr
    (written,) = (tmp_path / "r/stacks").iterdir()
    assert written.name == f"rank-{rank}.txt"
    assert f"rank {rank}: {CORRUPT}" in written.read_text()


def test_an_error_that_has_no_name_is_told_with_its_rank_too(tmp_path):
    it = Run(2, tmp_path / "r", fault="raise@rank=1,step=9")
    assert it.end() == [RankLost.exit_code, 1], it.stderr
    assert "hpc-supcon: error: rank 1: InjectedError: step of step 9" in it.stderr
    assert "was lost" not in it.stderr
    assert "InjectedError" in (tmp_path / "r/stacks/rank-1.txt").read_text()


def test_an_error_that_all_ranks_have_is_told_once(tmp_path):
    it = Run(3, tmp_path / "r", fault=";".join(f"corrupt@rank={rank},step=9" for rank in range(3)))
    assert it.end() == [CorruptSample.exit_code] * 3, it.stderr
    assert it.stderr.count(CORRUPT) == 1, it.stderr


def test_different_errors_of_two_ranks_are_both_told(tmp_path):
    it = Run(2, tmp_path / "r", fault="corrupt@rank=0,step=9;raise@rank=1,step=9")
    it.end()
    assert f"rank 0: {CORRUPT}" in it.stderr
    assert "InjectedError" in it.stderr
