"""The run folder: its files, whether a run may use it, its configuration and its results."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .config import Config, Stage, check_folder, differences, load_config, records, to_yaml
from .errors import PartChanged, RunFolderError
from .files import file_lock, write_atomically
from .parts import KINDS, Kind

CONFIG, RESULTS, SCORES = "config.yaml", "results.json", "scores.json"
CHECKPOINTS, PROFILE, PARTS = "checkpoints", "profile", "parts.json"
OWN = frozenset({CONFIG, RESULTS, CHECKPOINTS, "metrics.jsonl"})
"""What a folder holds in which a run has been."""


def is_used(folder: Path) -> bool:
    """Whether a run has written there, or the path is a file. A folder without a run's own files is new: it may hold
    the log of a scheduler. Raises RunFolderError where that cannot be read."""
    try:
        return folder.exists() and (not folder.is_dir() or not OWN.isdisjoint(p.name for p in folder.iterdir()))
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be read: {error.strerror}") from None


def check_usable(folder: Path, config: Config, *, resume: bool, kinds: tuple[Kind, ...] = KINDS) -> None:
    """Raise RunFolderError unless a run with this config may write here; PartChanged for other code of parts of
    `kinds`. Changes nothing."""
    if not is_used(folder):
        return
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file, not a run folder; choose another run_dir")
    if not resume:
        raise RunFolderError(f"{folder}: already used; add --resume to continue, or choose another with run_dir=PATH")
    changed = differences(read_config(folder), config)
    if changed:
        raise RunFolderError(
            f"{folder}: holds a run with other settings ({'; '.join(changed)}); resume with the same ones, "
            "or choose another run_dir"
        )
    if (code := changed_parts(folder, config, kinds)) and not config.train.allow_code_change:
        raise PartChanged(
            f"{folder}: the code is not that which the run was started with: {'; '.join(code)}; bring it back, go on "
            "with train.allow_code_change=true, or choose another run_dir"
        )


def create(folder: Path, config: Config) -> None:
    """Make the folder and write the resolved configuration to config.yaml. Raises RunFolderError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, to_yaml(config))
        freeze_parts(folder, config)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be made: {error.strerror}") from None


def freeze_parts(folder: Path, config: Config) -> None:
    """Write parts.json: the parts of a user's own that pre-training uses, each with its module, version, and the
    sha256 of its file. No file where there are none. Raises OSError."""
    if found := records(config):
        write_atomically(folder / PARTS, json.dumps(found, indent=1) + "\n")
    else:
        (folder / PARTS).unlink(missing_ok=True)


def changed_parts(folder: Path, config: Config, kinds: tuple[Kind, ...] = KINDS) -> list[str]:
    """What is no longer as parts.json has it, one text for each part of `kinds`. Imports these parts. Raises
    RunFolderError."""
    path = folder / PARTS
    try:
        frozen = json.loads(path.read_text(encoding="utf-8"))
        before = {name: (entry["sha256"], entry["version"]) for name, entry in frozen.items()}
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunFolderError(f"{path}: damaged; move it away to go on without this record") from None
    changed = []
    for name, record in records(config, kinds=kinds).items():
        if name not in before:
            continue  # differences of settings are told by check_usable
        if before[name][0] != record["sha256"]:
            changed.append(
                f"{name}: {record['file']} was changed ({_short(before[name][0])}, now {_short(record['sha256'])})"
            )
        elif before[name][1] != record["version"]:
            changed.append(f"{name}: was of {before[name][1]}, is of {record['version']}")
    return changed


def _short(digest: str | None) -> str:
    return "no file" if digest is None else f"sha256 {str(digest)[:12]}"


def check_checkpoints(folder: Path) -> None:
    """Raise RunFolderError where this process may not save checkpoints; call it before training."""
    path = folder / CHECKPOINTS
    if path.exists() and not os.access(path, os.W_OK | os.X_OK):
        raise RunFolderError(f"{path}: no right to write there, so no checkpoint could be saved")


def identity(folder: Path) -> str:
    """A text by which two machines find out whether they see the same run folder: what is in its config.yaml."""
    try:
        return f"sha256:{hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()[:16]}"
    except OSError:
        return "absent"


def check_still_there(folder: Path) -> None:
    """Raise RunFolderError if the folder of a running run is no longer there.

    One that cannot be read at the moment, on a disk that fails, counts as there: whoever writes finds that out.
    """
    try:
        is_there = (folder / CONFIG).is_file()
    except OSError:
        return
    if not is_there:
        raise RunFolderError(
            f"{folder}: was deleted or moved while the run trained; nothing is saved there. Start the run again, or "
            "put the folder back and continue with --resume"
        )


def check_is_run(folder: Path) -> None:
    """Raise RunFolderError if the folder is not a run folder."""
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{folder}: no {CONFIG} in it, so this is not a run folder")


def read_config(
    folder: Path, overrides: list[str] | tuple[str, ...] = (), *, stages: tuple[Stage, ...] = ()
) -> Config:
    """The configuration of a run, with overrides, checked for `stages` as by `load_config`.

    Raises RunFolderError if the folder is not a run folder, ConfigError, and CodeNotAllowed where it names code that
    the user has not allowed.
    """
    check_is_run(folder)
    check_folder(folder)
    return load_config(folder / CONFIG, overrides, stages=stages)


def check_results(folder: Path) -> None:
    """Raise RunFolderError for a results.json or scores.json to which nothing can be added; call it before work."""
    read_results(folder)
    read_scores(folder)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The entries of results.json; none where there is no such file. Raises RunFolderError."""
    return _read_results(folder / RESULTS) if (folder / RESULTS).exists() else []


def add_result(folder: Path, result: dict[str, Any]) -> None:
    """Add an entry to results.json, in place of an earlier one of the same stage, probe, checkpoint and folder.

    Several processes may do so at once. Raises OSError, RunFolderError; the file is then as it was.
    """
    path = folder / RESULTS
    key = ("stage", "probe", "checkpoint", "folder")
    with file_lock(folder / f".{RESULTS}.lock"):
        results = read_results(folder)
        results = [r for r in results if any(r.get(k) != result.get(k) for k in key)] + [result]
        write_atomically(path, json.dumps({"results": results}, indent=2) + "\n")


def add_scores(folder: Path, section: str, key: str, scores: dict[str, Any]) -> None:
    """Set `section`.`key` of scores.json, a JSON object of objects, and keep the rest.

    Several processes may do so at once. Raises OSError, RunFolderError; the file is then as it was.
    """
    path = folder / SCORES
    with file_lock(folder / f".{SCORES}.lock"):
        found = read_scores(folder)
        found.setdefault(section, {})[key] = scores
        # lists on one line each: a confusion matrix of 100 classes has 10,000 numbers
        write_atomically(path, _LIST.sub(_on_one_line, json.dumps(found, indent=1)) + "\n")


_LIST = re.compile(r"\[\n[^][{}]*?\n\s*\]")
"""A list of indented JSON that holds no list or object; a line break is never inside of a text."""


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[", 1)[:-2] + "]"


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The sections of scores.json; none where there is no such file. Raises RunFolderError."""
    path = folder / SCORES
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(scores, dict) and all(isinstance(section, dict) for section in scores.values()):
            return scores
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}; move it away and evaluate again") from None
    except (ValueError, RecursionError):
        pass
    raise RunFolderError(f"{path}: damaged, or not a file of scores; move it away and evaluate again")


def _read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a file that `add_result` wrote. Raises RunFolderError for any other file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if isinstance(results, list) and all(isinstance(result, dict) for result in results):
            return results
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}; move it away and evaluate again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise RunFolderError(f"{path}: damaged, or not a file of results; move it away and evaluate again")
