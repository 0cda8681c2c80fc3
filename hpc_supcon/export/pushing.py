"""Gives a run's model away: as a folder, or as a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import run_folder
from ..errors import ConfigError, HubError, OutputError
from ..files import atomic_folder
from ..hub_names import hub_name, is_on_hub
from ..models.hub import LOGIN, check_hub, hub_errors
from ..models.weight_files import OWN_KEY, read_model_config
from .card import write_card
from .model_folder import Written, write_model

CARD, PAGE = "README.md", "report.html"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Pushed:
    where: str
    """The folder, or the address of the commit on the Hub."""
    files: tuple[str, ...]
    bytes: int
    not_timm: str | None
    """Why timm and transformers cannot build the encoder; None where they can."""


def push(
    run: Path,
    to: str,
    *,
    license: str | None = None,
    page: bool = True,
    private: bool = False,
    force: bool = False,
) -> Pushed:
    """Write the model of a run's best checkpoint to the folder `to`, or to hf:NAME in one commit.

    license: as the Hub names it, such as apache-2.0. page: add the run's page, which may hold small copies of
    images. private: of a repository that is made on the Hub. force: replace a folder that an earlier push wrote. All
    files are complete before the first one is where `to` says.

    Raises ConfigError, OutputError, RunFolderError, CheckpointCorrupt, HubError and MissingExtra.
    """
    run_folder.read_config(run)
    if license is not None and not LICENSE.fullmatch(license):
        raise ConfigError(
            f"--license={license}: give the Hub's name of a license, such as apache-2.0, mit, cc-by-4.0 or other"
        )
    check_hub()  # the card is written by its package
    if is_on_hub(to):
        account = _check_login(to)
    else:
        check_target(Path(to), force=force)
    with tempfile.TemporaryDirectory(prefix="hpc-supcon-") as temporary:
        folder = Path(temporary)
        written = _write(run, folder, to, license, page)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        where = _upload(folder, to, private, account) if is_on_hub(to) else _place(folder, Path(to), force)
    return Pushed(where, tuple(sizes), sum(sizes.values()), written.not_timm)


def check_target(path: Path, *, force: bool) -> None:
    """Raise OutputError unless a model may be written to the folder `path`; only what push wrote is replaced."""
    if not path.resolve().parent.is_dir():
        raise OutputError(f"--to {path}: {path.parent} does not exist: make the folder first")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        is_pushed = OWN_KEY in read_model_config(str(path))
    except ConfigError:
        is_pushed = False
    if not is_pushed:
        raise OutputError(f"--to {path}: exists, and is not a folder that push wrote; choose another")
    if not force:
        raise OutputError(f"--to {path}: exists already; choose another folder, or replace it with --force")


def _write(run: Path, folder: Path, to: str, license: str | None, page: bool) -> Written:
    from ..pages.page import render
    from ..pages.runs import page_of_runs

    name = run_folder.read_config(run).name
    try:
        written = write_model(run, folder, name=name)
        if page:
            (folder / PAGE).write_text(render(page_of_runs([run])), encoding="utf-8")
        write_card(run, folder / CARD, written, where=to, license=license, page=page)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
    return written


def _place(folder: Path, path: Path, force: bool) -> str:
    try:
        with atomic_folder(path, replace=force) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            partial.chmod(0o755)
    except OSError as error:
        raise OutputError(f"--to {path}: cannot be written: {error.strerror or error}") from None
    return str(path)


def _check_login(to: str) -> str:
    """The account's name on the Hub. Raises ConfigError, HubError."""
    from huggingface_hub import HfApi, get_token

    name, revision = hub_name("--to", to)
    if revision is not None:
        raise ConfigError(f"--to {to}: a push makes a new commit of the main branch: give hf:{name}")
    if get_token() is None:
        raise HubError(f"--to {to}: no token for the Hugging Face Hub: {LOGIN}")
    with hub_errors(f"--to {to}"):
        return str(HfApi().whoami()["name"])


def _upload(folder: Path, to: str, private: bool, account: str) -> str:
    from huggingface_hub import HfApi

    api, (name, _) = HfApi(), hub_name("--to", to)
    name = name if "/" in name else f"{account}/{name}"
    with hub_errors(f"--to {to}"):
        is_new = not api.repo_exists(name)
        api.create_repo(name, private=private, exist_ok=True)
    with hub_errors(f"--to {to}" + (" (its repository is made, and empty)" if is_new else "")):
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model of hpc-supcon push")
    return str(commit.commit_url)
