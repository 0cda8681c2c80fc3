"""Writing results: what does not fit on the disk any more is printed, because computing it took long."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import run_folder
from ..distributed.collectives import propagate_errors
from ..distributed.folder_lock import locked
from ..distributed.launch import Runtime
from ..errors import ResultsNotWritten, RunFolderError
from ..terminal import warn


@contextmanager
def writing(folder: Path, runtime: Runtime, writer: ResultWriter | None) -> Iterator[ResultWriter]:
    """`writer`, or one that is checked at the end; inside, no other run writes in `folder`. Collective.

    Raises on all ranks what run_lock raises, and ResultsNotWritten as `check`, unless a `writer` is given.
    """
    own = writer or ResultWriter()
    with locked(folder, runtime, warn):
        yield own
    if writer is None:
        own.check()


class ResultWriter:
    """Writes entries into results.json files, on rank 0 only. Failures are told, and raised by `check`."""

    def __init__(self) -> None:
        self._problem: str | None = None

    def add(self, folder: Path, result: dict[str, Any]) -> None:
        """See run_folder.add_result; an entry that cannot be written is printed to stdout, as one line of JSON."""
        try:
            run_folder.add_result(folder, result)
        except (OSError, RunFolderError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            problem = f"{folder / run_folder.RESULTS}: not written: {reason}"
            if self._problem is None:
                self._problem = problem
                warn(f"{problem}; the results are printed to stdout as JSON")
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        """An error of the block, which writes another file of results, is told, and raised by `check`."""
        try:
            yield
        except (OSError, RunFolderError) as error:
            problem = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                problem = f"{error.filename}: not written: {error.strerror}"
            warn(problem)
            self._problem = self._problem or problem

    def check(self) -> None:
        """Raise ResultsNotWritten, on all ranks, if anything could not be written. Collective."""
        with propagate_errors():
            if self._problem is not None:
                raise ResultsNotWritten(f"not all results are in the run folder: {self._problem}")
