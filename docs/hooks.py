"""What is made when the documentation is built: pages of every setting, every command and every notebook, and
formulas as MathML."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from hpc_supcon.config import recipe_names, schema_rows

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = "*This page is the notebook [{0}.ipynb]({0}.ipynb) of `examples/`, executed as it stands.*\n\n"


def on_files(files: Files, config: Any) -> Files:
    for path, text in {"reference/settings.md": settings(), "reference/cli.md": commands()}.items():
        files.append(File.generated(config, path, content=text))
    for path, content in notebooks():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def formula(found: re.Match[str]) -> str:
        tag, text = found[1], html.unescape(found[2]).strip()
        made: str = convert(text[2:-2], display="block" if tag == "div" else "inline")
        return made

    return re.sub(r'(?s)<(span|div) class="arithmatex">(.*?)</\1>', formula, content)


def notebooks() -> Iterator[tuple[str, str | bytes]]:
    """(name, content) of the files of each notebook: a page with its outputs, their pictures, and the notebook."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        name = path.stem
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # links that lead from examples/ to pages and other notebooks
                cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell.source.replace("](../docs/", "](../"))
        resources = {"output_files_dir": f"{name}_files"}
        text, made = MarkdownExporter().from_notebook_node(notebook, resources)
        title, _, rest = text.lstrip().partition("\n")
        yield f"notebooks/{name}.md", f"{title}\n\n{NOTEBOOK.format(name)}{rest}"
        yield f"notebooks/{name}.ipynb", path.read_bytes()
        for picture, content in made["outputs"].items():
            yield f"notebooks/{picture}", content


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
