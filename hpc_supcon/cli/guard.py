"""No command executes code that a folder names: one check of every argument of every command, and `--allow-code`.

Both are added to the commands as they are built, so that none can be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from .. import parts
from ..config import check_folder

OPTION = "--allow-code"


def guarded(command: Any) -> Any:
    """The click command, with all its subcommands, each with the option and with its arguments checked."""
    for sub in getattr(command, "commands", {}).values():
        guarded(sub)
    if not hasattr(command, "commands"):
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                parameter.callback = _checked(parameter.callback)
        command.params.append(_allow_code())
    return command


def _allow(names: list[str] | None) -> list[str] | None:
    parts.allow(names or (), OPTION)
    return names


def _command(
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            OPTION,
            metavar="MODULE:NAME",
            callback=_allow,
            is_eager=True,  # before the arguments are checked, wherever it stands
            expose_value=False,
            help="Code that a run folder or a grid folder names, and that may be executed; repeat for several.",
        ),
    ] = None,
) -> None:
    """Has the option."""


def _allow_code() -> Any:
    """The option, as Typer makes it."""
    app = typer.Typer(add_completion=False)
    app.command()(_command)
    made: Any = get_command(app)
    return next(parameter for parameter in made.params if OPTION in parameter.opts)


def _checked(before: Any) -> Any:
    def check(context: Any, parameter: Any, value: Any) -> Any:
        for text in _texts(value):
            _check(Path(text))
        return value if before is None else before(context, parameter, value)

    return check


def _check(path: Path) -> None:
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):  # not a path: a setting, a name
        return
    if is_folder:
        check_folder(path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
