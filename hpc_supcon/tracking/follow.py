"""The process that tells a tracker about a run folder, for as long as the run lasts."""

from __future__ import annotations

import os
import select
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .. import parts
from ..errors import on_one_line, printable
from ..files import file_lock
from ..metric_file import METRICS, Event, parse_event
from ..run_folder import CONFIG, RESULTS, read_config, read_results
from ..terminal import warn
from . import TRACKERS
from .record import Row, Tracker, files_of, row_of
from .state import FOLDER, State, read_state, write_state

POLL_S, RETRY_S = 2.0, 60.0
"""Between two looks at the run folder, and between two attempts after the tracker has failed."""
BATCH = 200
"""Events after which what was told is written down; a kill has at most these told twice."""
LOCK_S = 120.0
FINISHED = b"finished"


class Lines:
    """New whole lines of a file that grows, and that a resumed run may replace."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._at = path, -1, 0
        self.is_appended = False
        """Whether the last `read` went on where the one before ended."""

    def read(self) -> list[Event]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.is_appended = status.st_ino == self._inode and status.st_size >= self._at
                if not self.is_appended:
                    self._inode, self._at = status.st_ino, 0
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self._at += len(whole) + 1 if whole else 0
        return [event for line in whole.split(b"\n") if (event := parse_event(line)) is not None]


class Follower:
    """Tells a tracker what is new in a run folder. What fails is told once, and tried again."""

    def __init__(self, folder: Path, name: str, artifacts: Sequence[str], tell: Callable[[str], None] = warn) -> None:
        self._folder, self._name, self._artifacts, self._tell = folder, name, artifacts, tell
        self._state: State = read_state(folder, name)
        self._lines = Lines(folder / METRICS)
        self._waiting: list[Event] = []
        self._tracker: Tracker | None = None
        self._retry_at, self._is_told = 0.0, False

    def look(self) -> None:
        """Send the events that are new."""
        if not (self._folder / CONFIG).is_file():
            return  # the run has not begun
        try:
            found = self._lines.read()
            appended = self._lines.is_appended
            if not appended:
                self._waiting = []  # they are in the file that was read from its start
            self._waiting += [e for e in found if not self._state.is_told(e, is_appended=appended)]
            if self._waiting and time.monotonic() >= self._retry_at:
                self._send()
        except Exception as error:
            self._failed(error)

    def _send(self) -> None:
        tracker, before = self._opened()
        if before != self._state.id:  # another record, which has nothing yet
            self._lines = Lines(self._folder / METRICS)
            self._waiting = self._lines.read()
        while self._waiting:
            batch = self._waiting[:BATCH]
            rows: list[Row] = []
            for event in batch:
                # a step may be waiting twice, from before and after a resume
                if not self._state.is_told(event, is_appended=True):
                    rows.append(row_of(event))
                    self._state.add(event)
            tracker.log(rows)
            self._waiting = self._waiting[BATCH:]
            write_state(self._folder, self._name, self._state)

    def _opened(self) -> tuple[Tracker, str | None]:
        """(the tracker, the id of its record before it was opened)"""
        before = self._state.id
        if self._tracker is None:
            config = read_config(self._folder)
            self._tracker = TRACKERS[self._name].open(self._folder, config, self._state, self._tell)
            write_state(self._folder, self._name, self._state)
        return self._tracker, before

    def finish(self, *, finished: bool) -> None:
        """Send what is left, with the files of a run that is `finished`, and close the record."""
        self._retry_at = 0.0
        self.look()
        try:
            if finished and not self._waiting and (self._folder / CONFIG).is_file():
                self._send_files()
            if self._tracker is not None:
                self._tracker.close(finished=finished)
        except Exception as error:
            self._failed(error)
        if self._waiting:
            self._tell(
                f"{self._name}: {len(self._waiting)} events are not sent; they are in {self._folder / METRICS}, and "
                f"`{command(self._folder, self._name)}` sends them"
            )

    def _send_files(self) -> None:
        tracker, _ = self._opened()
        for kind, path in files_of(self._folder, self._artifacts):
            name = str(path.relative_to(self._folder))
            changed = path.stat().st_mtime_ns
            if self._state.files.get(name) == changed:
                continue
            if name == RESULTS:
                tracker.results(read_results(self._folder))
                self._state.rows += 1
            tracker.file(kind, name, path)
            self._state.rows += 1  # a picture or a page is a row of the record
            self._state.files[name] = changed
            write_state(self._folder, self._name, self._state)

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        # the state of a record that may have taken a part is what was written last
        self._state, self._tracker = read_state(self._folder, self._name), None
        if not self._is_told:
            self._is_told = True
            self._tell(f"{self._name}: {on_one_line(error)}; the run goes on, and tries again every {RETRY_S:g} s")


def track(folder: Path, name: str, artifacts: Sequence[str]) -> None:
    """Send a tracker what it has not received of a run that has ended."""
    with _alone(folder, name):
        Follower(folder, name, artifacts).finish(finished=True)


def main(arguments: Sequence[str]) -> None:
    """FOLDER NAME ENDING_S FINISHING_S CODE ARTIFACT...: follow until stdin ends or this process's parent does.

    A line FINISHED before that says that the run is complete. What is left is then sent in FINISHING_S seconds, else
    in ENDING_S.
    """
    folder, name, artifacts = Path(arguments[0]), arguments[1], arguments[5:]
    parts.allow(filter(None, arguments[4].split(",")), "CODE")  # the run's settings may name it; nothing is imported
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # those of the run: what is left is sent when it ends
    os.nice(10)
    end = RunEnd(folder, name, ending_s=int(arguments[2]), finishing_s=int(arguments[3]))
    while not (folder / CONFIG).is_file():
        if end.wait(0.2):
            return  # the run was refused
    with _alone(folder, name):
        follower = Follower(folder, name, artifacts)
        follower.look()
        while not end.wait(POLL_S):
            follower.look()
        follower.finish(finished=end.finished)


class RunEnd:
    """The end of the run whose process started this one, seen whatever a tracker is doing at that time.

    After a limit from then on, this process ends as it is.
    """

    def __init__(self, folder: Path, name: str, *, ending_s: int, finishing_s: int) -> None:
        self._folder, self._name, self._limits_s = folder, name, (ending_s, finishing_s)
        self.finished = False
        """Whether the run is complete."""
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()

    def wait(self, seconds: float) -> bool:
        return self._is_over.wait(seconds)

    def _watch(self, parent: int) -> None:
        # stdin does not end with a run whose worker processes live on: they have it open as well
        while not select.select([0], [], [], POLL_S)[0] and os.getppid() == parent:
            pass
        if os.getppid() == parent or select.select([0], [], [], 0)[0]:
            self.finished = os.read(0, len(FINISHED)) == FINISHED
        self._is_over.set()
        limit_s = self._limits_s[self.finished]
        time.sleep(limit_s)
        rest = f"`{command(self._folder, self._name)}` sends the rest"
        warn(f"{self._name}: not all was sent within {limit_s} s; {rest}")
        os._exit(0)


def command(folder: Path, name: str) -> str:
    """What sends the rest."""
    return f"hpc-supcon track {shlex.quote(printable(folder))} log.to={name}"


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """After the process of a run before this one, which may still be sending what it had left."""
    with ExitStack() as stack:
        with suppress(OSError):  # which writing the state tells
            (folder / FOLDER).mkdir(exist_ok=True)
            stack.enter_context(file_lock(folder / FOLDER / f".{name}.lock", wait_s=LOCK_S))
        yield
