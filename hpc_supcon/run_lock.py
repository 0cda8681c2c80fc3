"""The lock of a run folder: one process at a time writes there.

RUN_DIR/.lock carries a POSIX lock and names its holder. The kernel gives such a lock up when its process ends,
however that happens, and no other process inherits it: a worker process that outlives its run does not keep it, as it
would keep a flock. It holds between the nodes of NFS and Lustre as well, if they are mounted with locks.

Some shared file systems have no locks, or locks that other nodes do not see (Lustre's `localflock`). There the
content of the file decides: a holder of this machine is alive if its pid and start time are those of a process; one
of another machine shows that it is alive by renewing the file's time every few seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from .errors import RunFolderError
from .files import NO_LOCKS
from .process import START_TIME, STATE, UNKNOWN, process_field

LOCK = ".lock"
HEARTBEAT_S = 5.0
"""Between two renewals of the file's time."""
SILENT_S = 30.0
"""A holder on another machine that has not renewed the time for this long has ended. Above the time for which NFS
caches the attributes of a file that changes every HEARTBEAT_S."""
ENDING_S = 2.0
"""How long a lock is waited for: a process that was killed a moment ago may still be giving its memory back."""
POLL_S = 0.1

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """A process, so that others can name it and tell whether it is alive."""

    host: str
    pid: int
    started: str
    """In clock ticks since boot."""
    machine: str
    """Of the kernel and its processes: two processes with the same value see each other under /proc."""
    since: str
    """When it took the lock, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @property
    def is_alive(self) -> bool | None:
        """None: unknown, since it is on another machine."""
        if self.machine != _machine():
            return None
        is_dead = process_field(self.pid, STATE) in ("Z", "X")  # killed, and its parent has not asked for that yet
        return process_field(self.pid, START_TIME) == self.started != UNKNOWN and not is_dead


@dataclass
class _Held:
    """A lock that this process holds."""

    folder: Path
    handle: int
    made: list[Path]
    """Folders that were made for it, the innermost first."""
    uses: int = 1
    released: threading.Event = field(default_factory=threading.Event)


_held: dict[tuple[int, int], _Held] = {}
"""By device and inode of the file. A process must not open a file that it has locked a second time: closing any
handle of it gives a POSIX lock up."""
_guard = threading.Lock()
"""For `_held` and the handles in it."""
_acquiring = threading.Lock()
"""Taken while a lock is being acquired, which may take long."""


@contextmanager
def run_lock(folder: Path, warn: Warn) -> Iterator[None]:
    """Inside, no other process that asks for the lock of `folder` gets it. The folder is made if it does not exist.

    A process may ask again for what it holds. The lock of a process that has ended is taken over, which `warn` is
    told in one line. Raises RunFolderError naming host and pid of the holder, and where this process may not write.
    """
    held = _acquire(folder, warn)
    try:
        yield
    finally:
        with _guard:
            held.uses -= 1
            if held.uses == 0:
                _release(held)


def release_all() -> None:
    """Give up every lock of this process, which is about to end without leaving its blocks."""
    with _guard:
        for held in list(_held.values()):
            _release(held)


def _acquire(folder: Path, warn: Warn) -> _Held:
    with _acquiring:
        with _guard, suppress(OSError):
            found = (folder / LOCK).stat()
            if (held := _held.get((found.st_dev, found.st_ino))) is not None:
                held.uses += 1
                return held
        made: list[Path] = []
        handle = None
        try:
            handle, has_lock = _open_locked(folder, made)
            _take_over(folder, handle, has_lock, warn)
            _write_holder(folder, handle, has_lock, warn)
        except BaseException as error:
            if isinstance(error, OSError) and handle is not None:  # else the file is another process's by now
                _remove(folder, made)
            if handle is not None:
                os.close(handle)
            if isinstance(error, OSError):
                what = "written to" if folder.is_dir() else "made"
                raise RunFolderError(f"{folder}: cannot be {what}: {error.strerror}") from None
            raise
        with _guard:
            found = os.fstat(handle)
            held = _held[found.st_dev, found.st_ino] = _Held(folder, handle, made)
    threading.Thread(target=_renew, args=(held,), name="run-lock", daemon=True).start()
    return held


def _open_locked(folder: Path, made: list[Path]) -> tuple[int, bool]:
    """(handle, whether the file system has locks) of the lock file, once no other process has it locked."""
    until = time.monotonic() + ENDING_S
    while True:
        _make(folder, made)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            has_lock = _try_lock(handle)
            if has_lock is None and time.monotonic() > until:
                raise _in_use(folder, _read_holder(handle))
            if has_lock is not None and _is_at(handle, folder / LOCK):
                return handle, has_lock
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # taken by another process, or removed by its last holder
        if has_lock is None:
            time.sleep(POLL_S)


def _make(folder: Path, made: list[Path]) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    made[:] = [*missing, *(path for path in made if path not in missing)]


def _try_lock(handle: int) -> bool | None:
    """True: locked. None: another process has it locked. False: there are no locks on this file system."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        if error.errno in NO_LOCKS:
            return False
        raise


def _is_at(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _take_over(folder: Path, handle: int, has_lock: bool, warn: Warn) -> None:
    """Raise RunFolderError if the process that the file names is alive; tell that it has ended, otherwise."""
    holder = _read_holder(handle)
    if holder is None:
        return
    alive = holder.is_alive and not has_lock  # the kernel gives this machine's processes no lock of a living one
    if holder.is_alive is None:
        warn(f"{folder}: waiting for up to {SILENT_S:g} s for a sign of life of {holder}, which has not given it up")
        alive = _renews(folder / LOCK)
    if alive:
        raise _in_use(folder, holder)
    warn(f"{folder}: taken over from {holder}, which has ended without giving it up")


def _renews(path: Path) -> bool:
    """Whether the file's time changes within SILENT_S."""
    first, until = path.stat().st_mtime_ns, time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        if path.stat().st_mtime_ns != first:
            return True
    return False


def _in_use(folder: Path, holder: Holder | None) -> RunFolderError:
    return RunFolderError(
        f"{folder}: in use by {holder or 'another process'}; wait until that ends, or choose another run folder"
    )


def _read_holder(handle: int) -> Holder | None:
    """None for an empty file: its last holder has given it up; or one that is not whole."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
        started, machine, since = (str(content[name]) for name in ("started", "machine", "since"))
        return Holder(str(content["host"]), int(content["pid"]), started, machine, since)
    except (ValueError, KeyError, TypeError):
        return None


def _write_holder(folder: Path, handle: int, has_lock: bool, warn: Warn) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    pid = os.getpid()
    own = Holder(socket.gethostname(), pid, process_field(pid, START_TIME), _machine(), since)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(own)).encode(), 0)
        os.fsync(handle)
    except OSError as error:
        if not has_lock:
            raise
        warn(f"{folder / LOCK}: not written: {error.strerror}; the folder is locked all the same")
        return
    if not has_lock:
        time.sleep(POLL_S)  # another process may have found the same holder dead: the last one to write has it
        if (last := _read_holder(handle)) != own:
            raise _in_use(folder, last)


def _machine() -> str:
    """Boot and process namespace: containers of one machine do not see each other's processes."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _renew(held: _Held) -> None:
    while not held.released.wait(HEARTBEAT_S):
        with _guard, suppress(OSError):  # a disk that is gone for a while: the next one may succeed
            if not held.released.is_set():
                os.utime(held.handle)


def _release(held: _Held) -> None:
    if held.released.is_set():  # by `release_all`, or this is a forked process
        return
    held.released.set()
    found = os.fstat(held.handle)
    del _held[found.st_dev, found.st_ino]
    with suppress(OSError):  # a disk that is gone or full: the next process finds out that this one has ended
        os.ftruncate(held.handle, 0)
    _remove(held.folder, held.made)
    os.close(held.handle)


def _remove(folder: Path, made: list[Path]) -> None:
    """Remove the folders that were made for the lock, if nothing was written there."""
    with suppress(OSError):
        if made and [path.name for path in folder.iterdir()] in ([LOCK], []):
            (folder / LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def _forget() -> None:
    """In a forked process, which holds none of the locks."""
    global _guard, _acquiring
    _guard, _acquiring = threading.Lock(), threading.Lock()
    for held in _held.values():
        held.released.set()
        os.close(held.handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
