"""The command `hpc-supcon track`: what trackers have not received of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..run_folder import read_config
from ..run_lock import run_lock
from ..terminal import warn
from .common import Debug, Overrides


def track(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Send to the trackers of log.to what they have not received of a run: events, results, pictures, the page.

    For a run whose machine had no network, or that was started without them.
    """
    settings = read_config(run_dir, overrides or [], stages=("pretrain",)).log
    from ..tracking import check_trackers
    from ..tracking.follow import track as send

    if not settings.trackers:
        raise ConfigError(f"{run_dir}: log.to names no tracker; add log.to=wandb or log.to=mlflow")
    check_trackers(settings.trackers)
    with run_lock(run_dir, warn):
        for name in settings.trackers:
            send(run_dir, name, settings.artifacts)
