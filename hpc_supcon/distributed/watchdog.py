"""Watching a stage: who is asked to leave, hangs or is lost (see watch.py for how the ranks leave together)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ..errors import RankLost
from . import preemption
from .launch import Runtime
from .store import Board, who
from .watch import Watch, make_current
from .watch_threads import Messenger, Watcher, ending, write_stacks


@contextmanager
def watching(folder: Path, *, step_s: float, first_step_s: float) -> Iterator[Watch]:
    """A watch for the length of a stage: signals are heard, threads run, and all are gone afterwards.

    step_s, first_step_s: the longest that a training step, and the first one, may take, in seconds. A rank that
    takes longer, or gives no sign of life for step_s, ends all ranks with RankLost's exit code; their stacks are
    in folder/stacks.
    """
    watch = Watch(folder, step_s=step_s, first_step_s=first_step_s)
    with preemption.listening() as heard:
        before = make_current(watch)
        watcher = Watcher(watch, heard)
        watcher.start()
        try:
            yield watch
        finally:
            watcher.stop()
            make_current(before)


@contextmanager
def connected(watch: Watch, runtime: Runtime) -> Iterator[None]:
    """Inside, the ranks of the process group watch each other.

    Raises RankLost when the connection to another rank breaks, with this rank's stack on disk.
    """
    watch.rank, watch.device = runtime.rank, runtime.device
    if runtime.world_size == 1:
        yield
        return
    watch.board = Board()
    watch.board.write("who", who())
    messenger = Messenger(watch, watch.board.twin())
    messenger.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_broken_connection(error):
            raise
        reason = str(error).strip().splitlines()[0]
        with ending:
            path = write_stacks(watch, reason, error)
        raise RankLost(
            f"rank {watch.rank}: another rank was lost ({watch.phase_now.name}, after step {watch.step}: "
            f"{reason:.160}); stack: {path}; start again with --resume"
        ) from error
    finally:
        messenger.stop()
        watch.board = None


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))
