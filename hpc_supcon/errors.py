"""Every error a user can meet, by name.

A message is one line: what was wrong, where, and what to do about it. `exit_code` is what the command
line leaves with; 2 says "the input was wrong and nothing was done".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HpcSupconError(Exception):
    """Base of all named errors."""

    exit_code = 2


class ConfigError(HpcSupconError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""


class UnsafeWeights(ConfigError):
    """A weights file that loads only by running code from it."""


class LaunchError(HpcSupconError):
    """The distributed environment (torchrun, Slurm) is partial or contradicts itself."""


class DataError(HpcSupconError):
    """A data set is missing, empty, or not what the configuration says."""


class CorruptSample(DataError):
    """One image cannot be used; the message names its path."""


class LossInputError(HpcSupconError):
    """Features or labels that no loss is defined on: wrong shape, wrong dtype, NaN or Inf."""


class RunFolderError(HpcSupconError):
    """The run folder is in use, missing, or holds another run."""


class CheckpointCorrupt(HpcSupconError):
    """A checkpoint's bytes are not those that were written, and no older verified one is left."""


class WorldSizeMismatch(HpcSupconError):
    """A run is being resumed on another number of ranks than it was started with."""


class OutputError(HpcSupconError):
    """A file that a command should write exists already, or cannot be written."""


class ExportError(HpcSupconError):
    """A model has no such form, or its exported file does not give the model's outputs; no file is left."""

    exit_code = 1


class MissingExtra(HpcSupconError):
    """An optional package is needed; the message holds the install line."""


class NonFinite(HpcSupconError):
    """Loss or gradients became NaN or Inf; training ended, and the step was not saved."""

    exit_code = 3


class OutOfMemory(HpcSupconError):
    """A training step does not fit into memory; the message holds the setting that makes it fit."""

    exit_code = 6


class LoaderDied(HpcSupconError):
    """What reads the data (a process or a thread) was killed, or gave nothing within the time-out."""

    exit_code = 4


class RankLost(HpcSupconError):
    """Another rank was killed, was stopped, or hangs; all end."""

    exit_code = 5


class Preempted(HpcSupconError):
    """The run was asked to leave (SIGTERM, SIGUSR2): it has saved, and is to be started again with --resume."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def unknown_name(kind: str, name: object, known: Iterable[str], *, listed: str | None = None) -> str:
    """The message for a name that does not exist: the nearest one, and the whole list.

    `listed` stands for a list too long to be read; three near names are then given.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1 if listed is None else 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    return f"unknown {kind} {str(name)!r}{hint} known: {listed or ', '.join(names)}"
