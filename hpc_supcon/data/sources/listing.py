"""Which files of a folder are images, and of which class if any: nothing is opened, only listed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import DataError, printable

IGNORED = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini")
"""Files and folders that desktops and archives create; names that begin with a dot are passed over too."""
_NAMED = 3
"""How many of those that are passed over are named."""

Note = Callable[[str], None]
"""Receives one line for the user."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder is passed over, whatever it is."""
    return name.startswith(".") or name.lower() in IGNORED


class PassedOver:
    """What was passed over below a folder, for one line about all of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files, self._folders = 0, 0
        self._named: list[str] = []

    def add(self, path: Path, *, is_folder: bool) -> None:
        if is_folder:
            self._folders += 1
        else:
            self._files += 1
        if len(self._named) < _NAMED:
            self._named.append(printable(path.relative_to(self._root)))

    def line(self) -> str | None:
        """None where nothing was."""
        counts = {"folder": self._folders, "file": self._files}
        parts = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        if not parts:
            return None
        more = " ..." if self._folders + self._files > len(self._named) else ""
        return f"{printable(self._root)}: passed over {' and '.join(parts)}: {', '.join(self._named)}{more}"


def list_splits(
    root: Path, names: Sequence[str], suffixes: Sequence[str], note: Note | None = None
) -> dict[str, dict[str, list[Path]]]:
    """Split -> class -> its image files, for the folders ROOT/NAME/CLASS; the first name is that of train.

    Classes and files are in the order of their names, and every split has the classes of train: one without a folder,
    or with an empty one, is an empty list. suffixes: ends of the names of image files, in lower case. note: receives
    one line about what was passed over, and one for each split that lacks classes. Raises DataError.
    """
    passed = PassedOver(root)
    train, *others = names
    listings = {name: _list_split(root / name, suffixes, passed) for name in names}
    classes = listings[train]
    for name, files in classes.items():
        if not files:
            raise DataError(
                f"class folder {root / train / name} has no images: add some, or remove this class from every split"
            )
    lines = [passed.line()]
    for split in others:
        found = {name: files for name, files in listings[split].items() if files}
        absent = [name for name in classes if name not in found]
        _check_extra(root / train, root / split, sorted(found.keys() - classes.keys()), absent)
        if not found:
            raise DataError(f"{root / split} has no images: add some, or remove it")
        if absent:
            lines.append(
                f"{printable(root / split)}: no image of {', '.join(map(printable, absent))}; its scores are "
                f"averages over the other {len(found)} of {len(classes)} classes"
            )
        listings[split] = {name: found.get(name, []) for name in classes}
    for line in lines:
        if note is not None and line is not None:
            note(line)
    return listings


def _check_extra(train: Path, other: Path, extra: list[str], absent: list[str]) -> None:
    if extra:
        instead = f" but none of {', '.join(absent)}" if absent else ""
        raise DataError(
            f"{other} has images of {', '.join(extra)}{instead}, and {train} has no such "
            f"class: rename the folder, add training images of it, or remove it from {other.name}"
        )


def list_images(root: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(image files, lines about others) under a folder, at any depth, in the order of their paths.

    Links are followed, each folder is listed once. suffixes: see list_splits. Raises DataError.
    """
    found: list[Path] = []
    others, seen, passed = 0, set(), PassedOver(root)
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in (*folders, *files) if is_ignored(name)):
            passed.add(Path(folder, name), is_folder=name in folders)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        names = [name for name in files if not is_ignored(name)]
        images = [name for name in names if name.lower().endswith(tuple(suffixes))]
        for name in images:
            check_regular(Path(folder, name))
            found.append(Path(folder, name))
        others += len(names) - len(images)
    lines = [passed.line()]
    if others:
        lines.append(f"{printable(root)}: left out {others} files that do not have the ending of an image file")
    return sorted(found), [line for line in lines if line is not None]


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _list_split(folder: Path, suffixes: Sequence[str], passed: PassedOver) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    listing: dict[str, list[Path]] = {}
    for entry in _visible(folder, passed):
        path = folder / entry.name
        if _is_folder(entry):
            listing[entry.name] = _list_class(path, suffixes, passed)
        elif path.suffix.lower() in suffixes:
            raise DataError(f"image {path} is next to the class folders: move it into one of them")
        elif entry.is_symlink() and not path.exists():
            raise DataError(f"{path} is a broken link: expected a class folder")
    if not listing:
        ends = "|".join(suffix.removeprefix(".") for suffix in suffixes)
        raise DataError(f"{folder} has no class folders: expected {folder}/CLASS/*.{ends}")
    return listing


def _list_class(folder: Path, suffixes: Sequence[str], passed: PassedOver) -> list[Path]:
    """The images of one class. Any other file is an error: skipping it might lose data."""
    files = []
    for entry in _visible(folder, passed):
        path = folder / entry.name
        if _is_folder(entry):
            raise DataError(f"{path} is a folder within a class folder: images must be in {folder} itself")
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path} is not an image file ({', '.join(suffixes)}): convert it or move it elsewhere")
        check_regular(path, entry)
        files.append(path)
    return files


def _visible(folder: Path, passed: PassedOver) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without what is ignored. Knows files from folders without a call for each."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if is_ignored(entry.name):
                passed.add(folder / entry.name, is_folder=_is_folder(entry))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    return [entry for entry in entries if not is_ignored(entry.name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def check_regular(path: Path, entry: os.DirEntry[str] | None = None) -> None:
    """Raise DataError for a FIFO, socket or device, which may block whoever opens it. A link to nothing passes: what
    reads it says so. entry: of this path, which may know without a call."""
    try:
        if entry is not None and entry.is_file():
            return
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise DataError(f"{path} is {kind}, not an image file: remove it or move it elsewhere")
