"""Parts that are not of this package: data sets, encoders, losses, policies, probes, loggers of a user's own.

Two kinds of names lead to code. `package.module:name` is an import path: it is imported only where the user has given
it himself, which whoever reads his input says by `allow`; names that a folder holds are not. Any other name is looked
up among the entry points of installed packages (group `hpc_supcon.KIND`), which may not have the name of a part of
this package. Nothing else in this package imports by a name, so that a name that nobody allowed is never imported.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from . import known_names
from .environment import is_first_rank
from .errors import CodeNotAllowed, HpcSupconError, PartError, raised_where, unknown_name
from .known_names import check_given
from .plugins import installed_entry_points, package_of
from .terminal import note

Kind = Literal["sources", "encoders", "losses", "policies", "probes", "loggers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP = "hpc_supcon."
"""Entry points of the group `hpc_supcon.KIND` are parts of that kind."""
GIVEN: dict[Kind, tuple[str, ...]] = {
    "sources": ("root",),
    "encoders": ("in_channels", "image_size", "out_dim"),
    "losses": (),
    "policies": (),
    "probes": (),
    "loggers": ("folder", "resumed_at"),
}
"""The keyword arguments that every part of a kind is called with, besides its options."""
ONE: dict[Kind, str] = {
    "sources": "data.source",
    "encoders": "model.encoder",
    "losses": "loss.name",
    "policies": "augment.policy",
    "probes": "probe.kind",
    "loggers": "log.to",
}
"""What a part of a kind is called in messages."""

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Part:
    """A part that was imported."""

    kind: Kind
    name: str
    """As it is written in the configuration."""
    call: Callable[..., Any]
    module: str
    version: str | None
    """NAME VERSION of the package that the module belongs to; None of a file that belongs to none."""
    file: str | None
    sha256: str | None
    """Of the module's file; None where it has none, as a module in C."""

    @property
    def where(self) -> str:
        return f"{ONE[self.kind]}={self.name}"

    def check_options(self, options: Mapping[str, Any], setting: str) -> None:
        """Raise PartError where the part cannot be called with these options. `setting`: that they are given by."""
        given = GIVEN[self.kind]
        try:
            parameters = inspect.signature(self.call).parameters
        except (TypeError, ValueError):
            raise PartError(f"{self.where}: has no signature by which its arguments could be checked") from None
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [] if takes_any else [key for key in given if key not in named]
        if missing:
            raise PartError(
                f"{self.where}: takes no argument {missing[0]!r}, but is called with "
                f"{_listed((*given, '**options'))} (its signature: {_signature(self.call)})"
            )
        for key in options:
            if key in given:
                raise PartError(f"{setting}.{key}: {self.name} is given its {key} by other settings; drop it")
            if not takes_any and key not in named:
                known = [n for n in named if n not in given]
                raise PartError(
                    f"{setting}: {unknown_name(f'option of {self.name}', key, known)}" + ("" if known else "none")
                )
        try:
            inspect.signature(self.call).bind(**dict.fromkeys(given), **options)
        except TypeError as error:
            raise PartError(
                f"{self.where}: {error}; give it in {setting} (its signature: {_signature(self.call)})"
            ) from None

    def build(self, options: Mapping[str, Any] | None = None, /, **given: Any) -> Any:
        """What the part returns for these arguments. Raises PartError for whatever it raises."""
        return run(self.where, self.call, **given, **(options or {}))

    def record(self) -> dict[str, str | None]:
        """What is frozen with a run."""
        return {"module": self.module, "version": self.version, "file": self.file, "sha256": self.sha256}


def run(where: str, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
    """What a function of a part returns. Raises PartError, of one line, for whatever it raises, but for a lack of
    memory, which others tell."""
    try:
        return function(*arguments, **keywords)
    except (HpcSupconError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):  # PyTorch's
            raise
        raise PartError(f"{where}: failed: {raised_where(error)} (--debug shows where)") from error


def is_path(name: str) -> bool:
    """Whether a name is an import path, package.module:name. What is none can never be imported."""
    return _PATH.fullmatch(name) is not None


def file_name(name: str) -> str:
    """The name of a part in the names of files and results."""
    return name.replace(":", ".")


def allow(names: Iterable[str], where: str) -> None:
    """Allow import paths for the rest of this process: the user has given them himself. Raises PartError for other
    names. `where`: who gives them, for messages."""
    for name in names:
        _split(name, where)
        known_names.allowed.add(name)


def allowed() -> list[str]:
    return sorted(known_names.allowed)


def check_allowed(names: Iterable[str], where: str) -> None:
    """Raise CodeNotAllowed where one of these names is an import path that the user has not given."""
    known = known_names.known()
    if refused := [name for name in dict.fromkeys(names) if is_path(name) and name not in known]:
        flags = " ".join(f"--allow-code {name}" for name in refused)
        raise CodeNotAllowed(
            f"{where}: names code to be executed, {', '.join(refused)}: nothing of it was imported; if you know this "
            f"code and trust it, add {flags}"
        )


def registered(kind: Kind) -> list[str]:
    """The names of this kind that installed packages have registered."""
    return sorted(_entry_points()[kind])


def is_own(kind: Kind, name: str, builtin: Collection[str]) -> bool:
    """Whether a name stands for a part that is not of this package. Imports nothing; raises PartError for an entry
    point of the name of one that is."""
    check_no_shadow(kind, name, builtin)
    return is_path(name) or (name not in builtin and name in _entry_points()[kind])


def check_no_shadow(kind: Kind, name: str, builtin: Collection[str]) -> None:
    """Raise PartError where an installed package has registered the name of a part of this package."""
    if name in builtin and name in (found := _entry_points()[kind]):
        raise PartError(
            f"{ONE[kind]}={name}: {package_of(found[name][0])} registers that name, which hpc_supcon has itself "
            f"(entry point {GROUP}{kind}): uninstall it, or have it renamed"
        )


def find(kind: Kind, name: str, builtin: Collection[str] = ()) -> Part | None:
    """The part of that name, imported; None for a name that is neither an import path nor registered.

    Raises PartError where it cannot be imported, CodeNotAllowed for an import path that the user has not given.
    """
    if (kind, name) in known_names.objects:
        own: Part = known_names.objects[kind, name]
        return own
    check_given(kind, name, ONE[kind])
    if is_path(name):
        check_allowed([name], ONE[kind])
        return _imported(kind, name, name)
    check_no_shadow(kind, name, builtin)
    found = _entry_points()[kind].get(name, [])
    if len(found) > 1:
        packages = " and ".join(sorted(map(package_of, found)))
        raise PartError(f"{ONE[kind]}={name}: {packages} register that name both: uninstall one of them")
    return _imported(kind, name, found[0].value) if found and name not in builtin else None


def options_of(name: str, own: Collection[str], options: Mapping[str, Any] | None, setting: str) -> Mapping[str, Any]:
    """The options of one of several own parts of a kind: all of them where it is the only one, else those under its
    name. Raises PartError."""
    if not options or len(own) < 2:
        return options or {}
    for key, value in options.items():
        if key not in own or not isinstance(value, Mapping):
            raise PartError(
                f"{setting}: with several parts of one's own, give {{NAME: {{option: value}}}} for {_listed(own)}"
            )
    chosen: Mapping[str, Any] = options.get(name, {})
    return chosen


@cache
def _imported(kind: Kind, name: str, path: str) -> Part:
    where = f"{ONE[kind]}={name}"
    module_name, attribute = _split(path, where)
    module = _import(module_name, where, from_here=name == path)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise PartError(
                f"{where}: {unknown_name(f'name in {module_name}', part, known, listed=_listed(known[:8]))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise PartError(f"{where}: is of type {type(found).__name__}, not a class or a function")
    file = getattr(module, "__file__", None)
    digest = None
    if file is not None and Path(file).is_file():
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if is_first_rank():
        note(f"{where}: imported {module_name} from {file or 'Python itself'}")
    return Part(kind, name, found, module_name, version_of(module_name), file, digest)


def _import(name: str, where: str, *, from_here: bool) -> Any:
    """A module; `from_here`: also from the current directory, after everything that is installed."""
    top, here = name.partition(".")[0], Path.cwd()
    if from_here:
        _check_not_hidden(top, here, where)
        if str(here) not in sys.path and "" not in sys.path:
            sys.path.append(str(here))
            importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        remedy = "; mend it, or start without it"
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            remedy = f"; install its package, or start in the folder that holds {top}.py (now: {here})"
        raise PartError(f"{where}: {name} cannot be imported: {raised_where(error)}{remedy}") from error


def _check_not_hidden(top: str, here: Path, where: str) -> None:
    """Raise PartError where a file of the current directory has the name of an installed module, which is imported in
    its place: the user may have meant either."""
    local = [path for path in (here / f"{top}.py", here / top / "__init__.py") if path.is_file()]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return
    origin = None if spec is None else spec.origin
    if local and spec is not None and not (origin and Path(origin).resolve().is_relative_to(here.resolve())):
        raise PartError(
            f"{where}: {local[0]} has the name of an installed module ({origin or 'of Python itself'}), which is "
            "imported in its place: rename the file, or start in another folder"
        )


def _split(path: str, where: str) -> tuple[str, str]:
    if not is_path(path):
        raise PartError(f"{where}: {path!r} is no import path: write package.module:name")
    module, _, attribute = path.partition(":")
    return module, attribute


@cache
def _entry_points() -> dict[Kind, dict[str, list[EntryPoint]]]:
    """Kind -> name -> its entry points, of which there should be one."""
    found = installed_entry_points(GROUP)
    return {kind: found.get(kind, {}) for kind in KINDS}


def version_of(module: str) -> str | None:
    names = metadata.packages_distributions().get(module.partition(".")[0], [])
    return f"{names[0]} {metadata.version(names[0])}" if names else None


def _signature(call: Callable[..., Any]) -> str:
    return " ".join(str(inspect.signature(call)).split())[:120]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
