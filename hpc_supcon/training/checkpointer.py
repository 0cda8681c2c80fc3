"""Saving a run's state: now, or as a snapshot that is written only if the run is asked to leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from .. import checkpoint, run_folder
from ..checkpoint import CheckpointWriter
from ..config import Config, digest
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..phases import phase
from ..terminal import warn
from .state import TrainState


class Checkpointer:
    """Saves the checkpoints of one run. Every rank has one; rank 0 writes. All methods are collective.

    As a context manager it waits at the end of the block for a save that is still being written.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], runtime: Runtime) -> None:
        """`description`: saved with every state, see `describe_model`."""
        self._folder, self._description = config.folder, description
        self._writer = _build_writer(config, runtime) if runtime.is_main else None

    @phase("checkpoint")
    def save(self, state: TrainState) -> None:
        """Save `state`, which may change as soon as this returns.

        Raises on all ranks: NonFinite when the last step was not finite, RunFolderError when saves fail (see
        CheckpointWriter).
        """
        write = self._prepare(state)
        with propagate_errors():
            write()

    def snapshot(self, state: TrainState) -> Callable[[], None]:
        """A function that saves `state` as it is now and returns when it is on disk. Raises NonFinite.

        The function is not collective, and any thread may call it, until the next training step: tensors are copied
        only when it is called. On ranks other than 0 it does nothing.
        """
        write = self._prepare(state)

        def write_to_disk() -> None:
            write()
            if self._writer is not None:
                self._writer.close()

        return write_to_disk

    def close(self) -> None:
        """Wait for a save that is still being written. Raises RunFolderError, on all ranks, when it failed."""
        with propagate_errors():
            if self._writer is not None:
                self._writer.close()

    def _prepare(self, state: TrainState) -> Callable[[], None]:
        """A function that saves `state`. Collective: every rank contributes its generators."""
        tensors, numbers = state.tensors(), {**state.numbers(), **self._description}
        protect = state.best_steps()

        def write() -> None:
            if self._writer is not None:
                run_folder.check_still_there(self._folder)  # a checkpoint without config.yaml could not be read
                self._writer.save(numbers["step"], tensors, numbers, protect=protect)

        return write

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:  # not collective: the error may be this rank's alone
            self._writer.__exit__(kind, error, trace)


def _build_writer(config: Config, runtime: Runtime) -> CheckpointWriter:
    settings = config.checkpoint
    save = partial(
        checkpoint.save_checkpoint,
        config.folder / run_folder.CHECKPOINTS,
        world_size=runtime.world_size,
        config_digest=digest(config),
        keep=settings.keep,
        keep_every=settings.keep_every_steps,
        trusted=set(),
    )
    return CheckpointWriter(
        save,
        asynchronous=settings.asynchronous,
        max_failed=settings.max_failed_saves,
        warn=warn,
    )
