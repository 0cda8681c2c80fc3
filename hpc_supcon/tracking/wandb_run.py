"""A run's record at Weights & Biases, or in RUN_DIR/wandb where there is no key or no network."""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from ..config import Config
from ..errors import on_one_line, printable
from ..terminal import note
from .record import Row, Tell, entry_name, flat
from .state import State

PROJECT = "hpc-supcon"
NETWORK_TIMEOUT_S = 10.0


class WandbRun:
    """Every kind of event has a step of its own, `KIND/step`: a probe counts its own iterations."""

    def __init__(self, folder: Path, config: Config, state: State, tell: Tell) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # what matters is told
        import wandb

        self._wandb, self._folder, self._name = wandb, folder, config.name
        if state.id is None:
            state.begin(secrets.token_hex(4), "wandb")
        self._mode = _mode(wandb.setup().settings.base_url, folder, tell)
        try:
            self._run = self._init(config, state, self._mode)
        except Exception as error:
            if self._mode is not None:
                raise
            tell(f"wandb: {on_one_line(error)}; {_later(folder)}")
            self._mode = "offline"
            self._run = self._init(config, state, self._mode)
        if self._mode is None and self._run.url:
            note(f"wandb: {self._run.url}")
        self._rows = max(state.rows, self._run.step)
        self._kinds: set[str] = set()

    def _init(self, config: Config, state: State, mode: Literal["offline"] | None) -> Any:
        settings = self._wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=state.id,
            name=config.name,
            dir=str(self._folder),
            config=config.model_dump(mode="json"),
            mode=mode,
            resume="allow",
            allow_val_change=True,
            settings=settings,
        )

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.kind not in self._kinds:
                self._kinds.add(row.kind)
                self._run.define_metric(f"{row.kind}/step", hidden=True)
                self._run.define_metric(f"{row.kind}/*", step_metric=f"{row.kind}/step")
            self._log({**row.numbers, f"{row.kind}/step": row.step, "time": row.time})
            self._run.summary.update(row.texts)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        # a step of our own: the parts of a record without a network would each begin at 0
        self._run.log(dict(numbers), step=self._rows)
        self._rows += 1

    def results(self, entries: Sequence[Mapping[str, Any]]) -> None:
        rows = [{"name": entry_name(entry), **dict(flat(entry))} for entry in entries]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[_cell(row.get(name)) for name in columns] for row in rows]
        self._log({"results": self._wandb.Table(columns=columns, data=data)})
        for row in rows:
            numbers = {n: v for n, v in row.items() if isinstance(v, (int, float))}
            self._run.summary.update({f"results/{row['name']}/{name}": value for name, value in numbers.items()})

    def file(self, kind: str, name: str, path: Path) -> None:
        if kind == "picture":
            self._log({name: self._wandb.Image(str(path))})
        elif kind == "page":
            self._log({name: self._wandb.Html(path.read_text(encoding="utf-8"), inject=False)})
        elif kind == "checkpoint":
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"name": path.name})
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact, aliases=[path.name])
        else:
            self._run.save(str(path.absolute()), base_path=str(self._folder.absolute()), policy="now")

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _cell(value: Any) -> str | None:
    """A column of a table has one type."""
    return None if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _mode(base_url: str, folder: Path, tell: Tell) -> Literal["offline"] | None:
    """`offline` without a key or a network, said in one line; None where wandb itself decides (WANDB_MODE)."""
    if os.environ.get("WANDB_MODE"):
        return None
    if not _has_key(base_url):
        tell(f"wandb: no API key (`wandb login`, or WANDB_API_KEY); {_later(folder)}")
        return "offline"
    try:
        with urllib.request.urlopen(base_url, timeout=NETWORK_TIMEOUT_S):  # noqa: S310 - the user's own server
            return None
    except HTTPError:
        return None  # it answers
    except (URLError, OSError) as error:
        tell(f"wandb: {base_url} cannot be reached ({on_one_line(error)}); {_later(folder)}")
        return "offline"


def _later(folder: Path) -> str:
    own = printable(folder / "wandb")
    return f"kept in {own}, to be sent by `wandb sync {shlex.quote(own)}/offline-run-*`"


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base_url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None
