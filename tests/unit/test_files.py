"""Folders whose content is executed belong to their owner alone."""

from __future__ import annotations

import os

import pytest

from hpc_supcon.errors import RunFolderError
from hpc_supcon.files import private_folder


def test_it_is_made_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert private_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720])
def test_one_that_others_may_write_in_is_refused_and_left_alone(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(RunFolderError, match=r"open: others may write there \(mode"):
        private_folder(folder)
    assert folder.stat().st_mode & 0o7777 == mode


def test_one_that_others_may_read_is_not_refused(tmp_path):
    (tmp_path / "read").mkdir(mode=0o755)
    (tmp_path / "read").chmod(0o755)
    assert private_folder(tmp_path / "read").is_dir()


def test_a_link_a_file_and_a_stranger_s_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RunFolderError, match="a link to one"):
        private_folder(tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be made: File exists"):
        private_folder(tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot be made: Not a directory"):
        private_folder(tmp_path / "file" / "below")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(RunFolderError, match=f"belongs to user {owner}"):
        private_folder(tmp_path / "real")
