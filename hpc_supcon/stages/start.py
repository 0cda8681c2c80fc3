"""The start of what computes: errors of one rank reach all of them, then the process group, the lock and the data.

Imports PyTorch when it is called, not before: a configuration is refused within a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, Stage, check_ranks, records, shared_settings
from ..environment import RANK_VARIABLES
from ..errors import HpcSupconError, LaunchError
from ..parts import KINDS
from ..terminal import warn

if TYPE_CHECKING:
    from ..distributed.launch import Runtime
    from ..training.data import Data


@contextmanager
def refused_together() -> Iterator[None]:
    """A named error of one rank in this block, which comes before its process group, is raised on every rank."""
    try:
        yield
    except LaunchError:
        raise  # without its launch, a rank does not know where the others are
    except HpcSupconError as error:
        if not any(name in os.environ for name in RANK_VARIABLES):
            raise  # without importing PyTorch
        from ..distributed.launch import refused, resolve

        raise refused(resolve(), error) from None


@contextmanager
def started(
    settings: Config,
    stages: tuple[Stage, ...],
    command: Mapping[str, object],
    *,
    resume: bool,
    folder: Path | None = None,
    of_run: Config | None = None,
) -> Iterator[tuple[Runtime, Data]]:
    """The process group, the lock of the run folder, and the data, for as long as a command runs these stages.

    folder: the run folder, where it need not be the one that the settings name. of_run: the settings that must be
    those of the run in it, where `settings` may name other data. command: its name and arguments,
    which all ranks must have in common as they have the settings. Raises RanksDiffer on all of them where they have
    not, before any of them does more.
    """
    from .. import run_folder
    from ..distributed import launch as rt
    from ..distributed.collectives import propagate_errors
    from ..distributed.folder_lock import locked
    from ..distributed.monitors import monitor_ranks, start_watchdog
    from ..tracking import check_trackers, processes
    from ..training.data import load_data

    folder = folder or settings.folder
    limits = settings.runtime
    with (
        ExitStack() as trackers,  # the last to end: no other rank waits for what they still have to send
        start_watchdog(
            folder,
            step_timeout_s=limits.timeout_s,
            first_step_timeout_s=limits.first_step_timeout_s,
        ) as watchdog,
        rt.start(
            device=limits.device,
            threads=limits.threads,
            timeout_s=limits.first_step_timeout_s,
            start_timeout_s=limits.start_timeout_s,
            deterministic=settings.deterministic,
            reuse_memory=limits.reuse_memory,
            facts=_facts(settings, stages, command),
        ) as runtime,
        monitor_ranks(watchdog, runtime),
    ):
        with propagate_errors():
            check_ranks(settings, runtime.world_size, stages=stages)
            if runtime.is_main:
                check_trackers(settings.log.trackers)
            # what does not train needs no loss, and says itself where the encoder's code has changed
            kinds = KINDS if "pretrain" in stages or "prune" in stages else ()
            # before minutes of decoding
            run_folder.check_usable(settings.folder, of_run or settings, resume=resume, kinds=kinds)
        with locked(folder, runtime, warn):
            if runtime.is_main:
                trackers.enter_context(processes.following(folder, settings.log.trackers, settings.log.artifacts))
            yield runtime, load_data(settings, runtime)


def _facts(settings: Config, stages: tuple[Stage, ...], command: Mapping[str, object]) -> dict[str, str]:
    """What all ranks must have in common before anything else: name -> value."""
    from .. import run_folder
    from ..training.agreement import versions

    facts = {name: str(value) for name, value in command.items()} | versions() | shared_settings(settings)
    facts |= {f"code of {name}": str(record["sha256"]) for name, record in records(settings, stages).items()}
    # all ranks read the folder that rank 0 writes
    return facts | {f"run_dir/{run_folder.CONFIG}": run_folder.identity(settings.folder)}
