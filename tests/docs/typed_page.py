"""A page of the documentation typed into a shell, and what that prints compared with what the page says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tests.docs import miniature, reader, shell
from tests.docs.pages import Block, blocks_of


def typed_blocks(page: Path, have: Sequence[str] = ()) -> list[Block]:
    """The blocks of a page that are run where its packages, and what `have` names, are there."""

    def has(name: str) -> bool:
        return name in have or (name != "slurm" and importlib.util.find_spec(name) is not None)

    blocks = [block for block in blocks_of(page) if block.is_run]
    here = [block for block in blocks if all(map(has, block.needs))]
    if os.environ.get("HPC_SUPCON_REQUIRE_EXTRAS") == "1":
        assert all(block in here or "slurm" in block.needs for block in blocks), (
            "packages that pages need are missing"
        )
    return here


def type_page(
    blocks: Sequence[Block], own: Path, server: shell.Server, folder: Path, ending: str = "", **variables: str
) -> Path:
    """Type `blocks`, then `ending`, into one shell in a folder with a reader's own things alone; returns that."""
    here = reader.desk(folder / "here", own, server)
    trace = folder / "trace"  # the commands, each with the time of its start
    script = f"exec 9>{shlex.quote(str(trace))}; BASH_XTRACEFD=9; PS4='+$EPOCHREALTIME '; set -x\n"
    script += "".join(f": {block}\n{_script(block, folder / f'block-{i}')}" for i, block in enumerate(blocks))
    variables[miniature.FOLDER] = str(here / "FOLDER")
    done = shell.typed(script + ending, server, here, **variables)
    assert done.returncode == 0, "\n".join([*trace.read_text().splitlines()[-8:], done.stderr[-4000:]])
    for i, block in enumerate(blocks):
        _compare(block, folder / f"block-{i}")
    return here


def _script(block: Block, files: Path) -> str:
    """What is typed for a block. Output that the page prints as well goes into a file for each command."""
    files.mkdir()
    text = block.text
    if block.language == "yaml":
        return f"cat >{block.title} <<'END'\n{text}END\n" if block.title else ""
    if block.language == "python":
        (files / "script.py").write_text(text)
        return f"python {files}/script.py\n"
    for word, meaning in reader.WORDS.items():
        text = re.sub(rf"\b{word}\b", meaning, text)
    if block.language == "sh":
        return text
    commands = [block.remarks["printed by"]] if block.language == "text" else [c for c, _ in block.commands()]
    return "".join(
        f"code=0; {{ {command}\n}} >{files}/{i} 2>&1 || code=$?; echo $code >{files}/{i}.code\n"
        for i, command in enumerate(commands)
    )


def _compare(block: Block, files: Path) -> None:
    if block.language == "text":
        printed = _shape((files / "0").read_text())
        for line in block.text.splitlines():
            assert re.search(_pattern(_shape(line.strip())), printed), f"{block}: {line!r} is not in\n{printed}"
    if block.language == "console":
        for i, (command, expected) in enumerate(block.commands()):
            printed, code = (files / f"{i}").read_text(), int((files / f"{i}.code").read_text())
            assert re.fullmatch(_pattern(expected), printed), f"{block}: {command} printed\n{printed}"
            assert (code != 0) == ("error: " in expected), f"{block}: {command} ended with exit code {code}"


def _pattern(text: str) -> str:
    return re.escape(text).replace(re.escape("..."), ".*")


def _shape(text: str) -> str:
    """Numbers are those of a training in miniature: only their form is compared."""
    return re.sub(r"\d", "0", text)
