"""What is made when the documentation is built: pages of every setting and every command, and formulas as MathML."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from itertools import groupby
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from hpc_supcon.config import recipe_names, schema_rows


def on_files(files: Files, config: Any) -> Files:
    for path, text in {"reference/settings.md": settings(), "reference/cli.md": commands()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def formula(found: re.Match[str]) -> str:
        tag, text = found[1], html.unescape(found[2]).strip()
        made: str = convert(text[2:-2], display="block" if tag == "div" else "inline")
        return made

    return re.sub(r'(?s)<(span|div) class="arithmatex">(.*?)</\1>', formula, content)


def settings() -> str:
    """One table for each section of the schema."""
    lines = [
        "# Settings",
        "",
        "Every setting with its type, default and unit, as `hpc-supcon config --schema` prints them. What a recipe "
        "changes of them: `hpc-supcon config NAME`.",
        "",
        f"Recipes, most with a twin `NAME-small`: {', '.join(f'`{name}`' for name in _full_recipes())}.",
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


def _full_recipes() -> list[str]:
    return [name for name in recipe_names() if not name.endswith("-small")]


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
