"""The named errors that users can meet.

A message is one line: what was wrong, where, and what to do about it. `exit_code` is the exit code of the command
line; 2 means that the input was wrong and nothing was done.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable
from pathlib import Path


def printable(text: object) -> str:
    """The text on one line, with escapes for what no terminal shows: control characters, bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class HpcSupconError(Exception):
    """Base of all named errors. Its message is printable, whatever names of files it contains."""

    exit_code = 2
    on_all_ranks = False
    """Every rank raises it, so that one line for each node is enough."""
    is_printed = False
    """It is on this node's terminal already."""
    of_this_rank = False
    """Whether the error is this process's alone, so that it is printed whatever its rank."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(text) if isinstance(text, str) else text for text in arguments))


class ConfigError(HpcSupconError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""


class UnsafeWeights(ConfigError):
    """A weights file that loads only by running code from it."""


class PartError(ConfigError):
    """A part of a user's own (see parts.py) cannot be imported, does not fit its signature, or fails."""


class CodeNotAllowed(HpcSupconError):
    """A folder names code that the user has not allowed to be executed; nothing of it was imported."""


class PartChanged(HpcSupconError):
    """The code of a part of a user's own is not that which the run was started with."""


class HubError(HpcSupconError):
    """A model cannot be read from the Hugging Face Hub, or written there."""


class LaunchError(HpcSupconError):
    """The distributed environment (torchrun, Slurm) is partial or contradicts itself."""


class RanksDiffer(HpcSupconError):
    """The ranks of a launch do not have the same command, settings, versions or data."""

    on_all_ranks = True


class RanksApart(LaunchError):
    """The ranks of a launch do not find each other, or cannot communicate."""

    of_this_rank = True


class DataError(HpcSupconError):
    """A data set is missing, empty, or not what the configuration says."""


class CorruptSample(DataError):
    """One image cannot be used; the message names its path."""


class DataChanged(DataError):
    """The data set is not the one that the run was started with."""


class LossInputError(HpcSupconError):
    """Features or labels for which the loss is not defined: wrong shape, wrong dtype, NaN or Inf."""


class RunFolderError(HpcSupconError):
    """The run folder is in use, missing, or holds another run."""


class CheckpointCorrupt(HpcSupconError):
    """A checkpoint is damaged, and no older one that verifies is left."""


class WorldSizeMismatch(HpcSupconError):
    """A run is being resumed on another number of ranks than it was started with."""


class OutputError(HpcSupconError):
    """A file that a command would write exists already, or cannot be written."""


class ResultsNotWritten(OutputError):
    """Results could not be written into results.json; they were printed instead."""

    exit_code = 1


class PruningError(HpcSupconError):
    """A pruned model is not what was asked for; nothing is written."""

    exit_code = 1


class ExportError(HpcSupconError):
    """A model cannot be exported to a format, or its exported file gives other outputs; no file is left."""

    exit_code = 1


class MissingExtra(HpcSupconError):
    """An optional package is needed; the message contains the command that installs it."""


class CallbackError(HpcSupconError):
    """A callback of the user's raised an exception, which is this error's `__cause__`; training ended."""

    exit_code = 1


class NonFinite(HpcSupconError):
    """Loss or gradients became NaN or Inf; training ended, and the step was not saved."""

    exit_code = 3
    on_all_ranks = True


class OutOfMemory(HpcSupconError):
    """A training step does not fit into memory; the message contains the setting with which it fits."""

    exit_code = 6


class LoaderDied(HpcSupconError):
    """A process or thread that reads the data was killed, or returned nothing within the timeout."""

    exit_code = 4


class RankLost(HpcSupconError):
    """Another rank was killed, was stopped, or hangs; all ranks end."""

    exit_code = 5
    of_this_rank = True


class Preempted(HpcSupconError):
    """SIGTERM or SIGUSR2 preempted the run. It has saved, and can be started again with --resume."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
    on_all_ranks = True


_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: BaseException) -> str:
    """The first line of the message of an error of another library, without colors, or the name of its type."""
    return (_COLOR.sub("", str(error)).strip().splitlines() or [type(error).__name__])[0]


def raised_where(error: BaseException) -> str:
    """Type, message and place of an error of a user's own code: `ValueError: too small (my_data.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    message = str(error).strip()
    return f"{type(error).__name__}{f': {first_line(error)}' if message else ''}{place}"


def on_one_line(error: BaseException, length: int = 200) -> str:
    """The beginning of the message of an error of another library whose first line says little."""
    return printable(" ".join(str(error).split())[:length] or type(error).__name__)


def unknown_name(kind: str, name: object, known: Iterable[str], *, listed: str | None = None) -> str:
    """The message for a name that does not exist: the nearest existing name, and the list of all.

    listed: text in place of a list that is too long to read; three near names are then given.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1 if listed is None else 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    return f"unknown {kind} {str(name)!r}{hint} known: {listed or ', '.join(names)}"
