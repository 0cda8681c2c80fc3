"""Claims about optional packages that are missing: in a run, and in these tests."""

from __future__ import annotations

import sys

import pytest

from hpc_supcon.data import TrainOrder, build_loader, open_beton
from hpc_supcon.data.loaders.ffcv import _libffcv
from hpc_supcon.data.sources.convert import convert
from hpc_supcon.errors import MissingExtra

from .contract import BATCH, N, open_train
from .extras import require


def test_without_ffcv_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("hpc_supcon.data.loaders.ffcv.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"libturbojpeg0-dev.*pip install 'hpc-supcon\[ffcv\]'"):
        _libffcv()


def test_without_dali_the_error_says_how_to_install_it(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hpc-supcon\[dali\]'"):
        build_loader("dali", open_train(folder), TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")


def test_beton_files_are_written_and_read_without_ffcv(monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    convert(open_train(folder), tmp_path / "a.beton")
    source = open_beton(tmp_path / "a.beton", image_size=16)
    loader = build_loader("torch", source, TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")
    for batch in loader.epoch(0):
        assert (batch.images[0] == source.read(int(batch.index[0]))).all()
    loader.close()


def test_a_missing_package_skips_its_tests_or_fails_them_where_required(monkeypatch):
    monkeypatch.delenv("HPC_SUPCON_REQUIRE_EXTRAS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"NOT TESTED\. To install: pip install it"):
        require("no_such_package", "pip install it")
    monkeypatch.setenv("HPC_SUPCON_REQUIRE_EXTRAS", "1")
    with pytest.raises(pytest.fail.Exception, match="pip install it"):
        require("no_such_package", "pip install it")
