"""Pages that are made of the package when the documentation is built: every setting, every command."""

from __future__ import annotations

import subprocess
import sys
from itertools import groupby
from typing import Any

from mkdocs.structure.files import File, Files

from hpc_supcon.config import recipe_names, schema_rows


def on_files(files: Files, config: Any) -> Files:
    for path, text in {"reference/settings.md": settings(), "reference/cli.md": commands()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def settings() -> str:
    """One table for each section of the schema."""
    lines = [
        "# Settings",
        "",
        "Every setting with its type, default and unit, as `hpc-supcon config --schema` prints them. Recipes: "
        f"{', '.join(f'`{name}`' for name in recipe_names())}.",
        "",
    ]
    for section, rows in groupby(schema_rows(), key=lambda row: _section(row[0])):
        lines += [f"## {section}", "", "| setting | type | default | unit | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key}` | {_cell(kind)} | {_code(default)} | {unit} | {_cell(meaning)} |"
            for key, kind, default, unit, meaning in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _section(key: str) -> str:
    return key.partition(".")[0] if "." in key else "run"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def commands() -> str:
    """The help of every command, as typer writes it."""
    line = [sys.executable, "-m", "typer", "hpc_supcon.cli.app", "utils", "docs", "--name", "hpc-supcon"]
    text = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return "# Commands\n\n" + text.partition("\n")[2]
