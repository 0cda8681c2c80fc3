"""Claims about files that are written atomically, and about folders that only their owner can access."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from hpc_supcon.errors import OutputError, RunFolderError
from hpc_supcon.files import atomic_path, check_output, output_file, private_folder, sync_folder, write_atomically


@pytest.fixture
def old(tmp_path) -> Path:
    """A file with the content `old`, alone in its folder."""
    path = tmp_path / "table.txt"
    path.write_text("old")
    return path


def assert_unchanged(path: Path) -> None:
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path], "nothing else is left in the folder"


def fail_halfway(path: Path, error: BaseException) -> None:
    path.write_text("half of the n")
    raise error


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """("fsync" | "rename", name of the file) of every such call from now on."""
    recorded = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        recorded.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def record_replace(path: Path, target: Path) -> Path:
        recorded.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return recorded


# ---- atomic_path and write_atomically


@pytest.mark.parametrize(("content", "written"), [("größer\n", "größer\n".encode()), (b"\x00\xff", b"\x00\xff")])
@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_created_or_replaced_with_the_content(old, content, written, durable):
    for path in (old, old.with_name("new.txt")):
        write_atomically(path, content, durable=durable)
        assert path.read_bytes() == written
    assert sorted(path.name for path in old.parent.iterdir()) == ["new.txt", "table.txt"]


def test_inside_the_block_the_old_file_is_complete(old):
    with atomic_path(old) as partial:
        partial.write_text("new")
        assert partial.parent == old.parent, "a rename between file systems would not be atomic"
        assert old.read_text() == "old"
    assert old.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("durable", [True, False])
def test_an_exception_in_the_block_leaves_the_old_file_alone(old, error, durable):
    with pytest.raises(error), atomic_path(old, durable=durable) as partial:
        fail_halfway(partial, error())
    assert_unchanged(old)


def test_an_exception_in_the_block_creates_no_file(tmp_path):
    with pytest.raises(ValueError, match="before"), atomic_path(tmp_path / "new.txt"):
        raise ValueError("before anything was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [True, False])
def test_a_rename_that_fails_leaves_the_old_file_alone(old, monkeypatch, durable):
    def refuse(path, target):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        write_atomically(old, "new", durable=durable)
    assert_unchanged(old)


def test_a_folder_at_the_path_is_not_replaced(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "taken", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_at_fsync_leaves_the_old_file_alone(old, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(old, "new")
    assert caught.value.filename == str(old), "the kernel names no file"
    assert_unchanged(old)


def test_a_durable_file_is_flushed_before_its_rename_and_its_folder_after(old, events):
    write_atomically(old, "new")
    (first, partial), (second, renamed), (third, folder) = events
    assert (first, second, third) == ("fsync", "rename", "fsync")
    assert partial == renamed != old.name
    assert folder == old.parent.name


def test_a_file_that_need_not_be_durable_is_not_flushed(old, events):
    write_atomically(old, "new", durable=False)
    assert [event for event, _ in events] == ["rename"]


def test_sync_folder_flushes_the_folder(tmp_path, events):
    sync_folder(tmp_path)
    assert events == [("fsync", tmp_path.name)]
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


SIZE = 1 << 20
WRITER = f"""
import sys
from pathlib import Path
from hpc_supcon.files import write_atomically
sys.stdin.readline()  # all writers start at the same time
for i in range(100):
    write_atomically(Path(sys.argv[1]), sys.argv[2] * {SIZE}, durable=i % 10 == 0)
"""


def test_processes_that_write_one_file_at_once_never_leave_a_torn_one(tmp_path, python):
    path = tmp_path / "table.txt"
    write_atomically(path, "0" * SIZE)
    command = [python, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, letter], stdin=subprocess.PIPE, text=True) for letter in "12"]
    for writer in writers:
        writer.stdin.write("start\n")
        writer.stdin.close()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        assert len(content) == SIZE
        assert len(set(content)) == 1, "parts of two writes in one file"
        seen.add(content[0])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen & {"1", "2"}
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_at_once_never_leave_a_torn_one(old):
    """In one process; as writers on two machines, they may have the same process id."""
    barrier, errors = threading.Barrier(2), []

    def write(letter: str) -> None:
        try:
            for _ in range(100):
                with atomic_path(old, durable=False) as partial:
                    barrier.wait(20)
                    partial.write_text(letter * 1000)
                    barrier.wait(20)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert old.read_text() in ("1" * 1000, "2" * 1000)


def test_a_writer_that_is_killed_leaves_the_old_file_complete(old, python):
    code = """
import os, signal, sys
from pathlib import Path
from hpc_supcon.files import atomic_path
with atomic_path(Path(sys.argv[1])) as partial:
    partial.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([python, "-c", code, str(old)]).returncode == -signal.SIGKILL
    assert old.read_text() == "old"


# ---- files that the user named


def test_an_existing_output_is_refused_unless_forced(old):
    with pytest.raises(OutputError, match=r"table\.txt exists already; choose another name with -o, or .* --force"):
        check_output(old, force=False)
    with pytest.raises(OutputError, match="exists already"), output_file(old, force=False) as partial:
        partial.write_text("new")
    assert_unchanged(old)
    with output_file(old, force=True) as partial:
        partial.write_text("new")
    assert old.read_text() == "new"


@pytest.mark.parametrize("force", [True, False])
def test_an_output_that_is_a_folder_or_in_none_is_refused(tmp_path, force):
    with pytest.raises(OutputError, match="is a folder; give a file name"):
        check_output(tmp_path, force=force)
    with pytest.raises(OutputError, match="missing does not exist: make the folder first"):
        check_output(tmp_path / "missing" / "table.txt", force=force)
    check_output(tmp_path / "table.txt", force=force)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named_and_the_old_one_kept(old):
    message = r"table\.txt: cannot be written: No space left on device"
    with pytest.raises(OutputError, match=message), output_file(old, force=True) as partial:
        fail_halfway(partial, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert_unchanged(old)


# ---- folders that only their owner can access


def test_a_private_folder_is_created_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert private_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720])
def test_a_folder_in_which_others_can_write_is_refused_and_not_changed(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(RunFolderError, match=r"open: others can write there \(mode"):
        private_folder(folder)
    assert folder.stat().st_mode & 0o7777 == mode


def test_a_folder_that_others_can_only_read_is_accepted(tmp_path):
    (tmp_path / "read").mkdir(mode=0o755)
    (tmp_path / "read").chmod(0o755)
    assert private_folder(tmp_path / "read").is_dir()


def test_a_link_a_file_and_a_folder_of_another_user_are_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RunFolderError, match="is a link or not a folder"):
        private_folder(tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be created: File exists"):
        private_folder(tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot be created: Not a directory"):
        private_folder(tmp_path / "file" / "below")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(RunFolderError, match=f"belongs to user {owner}"):
        private_folder(tmp_path / "real")
