"""How a run's state gets to disk and back: which checkpoint to go on from, on how many ranks, what is saved when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import checkpoint, run_folder
from ..checkpoint.writer import CheckpointWriter
from ..config import Config, digest
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime, seed_everything
from ..errors import WorldSizeMismatch
from ..phases import phase
from . import assemble
from .metrics import console
from .state import TrainState
from .validation import VIEWS_STREAM

Hold = Callable[[TrainState], Callable[[], None]]
"""state -> what saves the state as it is now, from any thread; collective."""


def resume_newest(state: TrainState, folder: Path, runtime: Runtime, config: Config) -> bool:
    """Load the newest checkpoint that verifies into `state`; False when the run has not saved one yet.

    Rank 0 chooses and the others load the same one: each choosing for itself could part them.
    """
    found: checkpoint.Checkpoint | None = None
    with propagate_errors():
        if runtime.is_main:
            found, refused = checkpoint.load_newest(folder / run_folder.CHECKPOINTS)
            for line in refused:
                console.print(f"not used: {line}", soft_wrap=True, style="yellow")
    path = gather_objects(found.path if found else None)[0]
    if path is None:
        if runtime.is_main:
            console.print(f"{folder}: no checkpoint yet, starting from step 0", soft_wrap=True)
        return False
    with propagate_errors():
        found = found or checkpoint.load_checkpoint(path)
        saved_world = found.manifest["world_size"]
        if saved_world != runtime.world_size and not config.train.allow_world_size_change:
            raise WorldSizeMismatch(
                f"{path}: saved by {saved_world} ranks, resumed on {runtime.world_size}; start {saved_world} ranks, "
                "or set train.allow_world_size_change=true"
            )
        with checkpoint.understood(path):
            state.load(found.tensors, found.state)
        if runtime.rank >= saved_world:
            _seed_new_rank(state, config, found.state, runtime)
    if runtime.is_main:
        changed = saved_world != runtime.world_size
        note = f" (saved by {saved_world} ranks, going on with {runtime.world_size})" if changed else ""
        console.print(f"{folder}: going on from step {state.step}{note}", soft_wrap=True)
    return True


def _seed_new_rank(state: TrainState, config: Config, description: dict[str, Any], runtime: Runtime) -> None:
    """Generators of a rank that did not exist when the checkpoint was saved: from seed, rank and step, so that
    nothing is drawn again that a rank of this number may have drawn earlier in the run."""
    seed_everything(config.seed, runtime.rank, state.step)
    views = assemble.build_views(config, description, runtime, stream=VIEWS_STREAM + state.step)
    state.views.load_state(views.to(runtime.device).state())


def checkpoint_writer(config: Config, folder: Path, runtime: Runtime) -> CheckpointWriter:
    """What saves this run's checkpoints; for rank 0."""
    settings = config.checkpoint
    write = partial(
        checkpoint.save_checkpoint,
        folder / run_folder.CHECKPOINTS,
        world_size=runtime.world_size,
        config_digest=digest(config),
        keep=settings.keep,
        keep_every=settings.keep_every_steps,
        trusted=set(),
    )
    return CheckpointWriter(
        write,
        asynchronous=settings.asynchronous,
        max_failed=settings.max_failed_saves,
        tell=lambda line: console.print(line, soft_wrap=True, style="yellow", markup=False),
    )


def hold(
    state: TrainState, *, folder: Path, writer: CheckpointWriter | None, description: dict[str, Any]
) -> Callable[[], None]:
    """What saves the state as it is now. Collective: every rank contributes its generators, rank 0 has the writer."""
    tensors, numbers, protect = state.tensors(), {**state.numbers(), **description}, state.best_steps()

    def write() -> None:
        if writer is not None:
            run_folder.check_still_there(folder)  # a checkpoint alone would be a folder that nothing can read
            writer.save(numbers["step"], tensors, numbers, protect=protect)

    return write


@phase("checkpoint")
def save(held: Hold, state: TrainState) -> None:
    """Save now. Collective; a failure is everybody's."""
    write = held(state)
    with propagate_errors():
        write()


def hold_to_leave(held: Hold, writer: CheckpointWriter | None, state: TrainState) -> Callable[[], None]:
    """As `hold`; what is returned comes back when all is on disk."""
    write = held(state)

    def write_and_close() -> None:
        write()
        if writer is not None:
            writer.close()

    return write_and_close
