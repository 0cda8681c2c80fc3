"""The code blocks of README and docs, as Markdown's own parser finds them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

LANGUAGES = ("sh", "console", "yaml", "python", "text")
"""sh: commands. console: `$ ` commands, each with all that it prints. yaml: a configuration or a grid, written to the
file of its title where it has one. python: a script. text: what a command prints.
Indented blocks are sh or console."""

REMARKS = ("not run", "needs", "printed by")
"""Comments before a block, which a reader of the page does not see: why it is not run; the packages without which it
is not run; the command that prints the text."""

_REMARK = re.compile(rf"<!-- ({'|'.join(REMARKS)}): (.+?) -->\s*")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    title: str | None
    remarks: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return "not run" not in self.remarks

    @property
    def needs(self) -> list[str]:
        return self.remarks.get("needs", "").split()

    def commands(self) -> list[tuple[str, str]]:
        """(command, what it prints) of a console block; of an sh block (its lines, nothing)."""
        if self.language != "console":
            return [(self.text, "")]
        parts = re.split(r"(?m)^\$ ", self.text)[1:]
        return [(found[0], found[1]) for part in parts if (found := re.split(r"(?<!\\)\n", part, maxsplit=1))]

    def lines_of_commands(self) -> Iterator[str]:
        """Each command of a shell block in one line, without its comment."""
        for text, _ in self.commands():
            for line in text.replace("\\\n", " ").splitlines():
                if bare := re.split(r"(?:^|\s)#", line)[0].strip():
                    yield bare


def blocks_of(page: Path) -> list[Block]:
    found, remarks = [], dict[str, str]()
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            remarks = dict(_REMARK.findall(token.content))
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split(" ")[0] or ("console" if token.content.startswith("$ ") else "sh")
            title = _TITLE.search(token.info)
            found.append(Block(page, token.map[0] + 1, language, token.content, title[1] if title else None, remarks))
            remarks = {}
        elif not token.hidden:
            remarks = {}
    return found


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages, in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in (languages or LANGUAGES)]


def of_hpc_supcon(line: str) -> list[str] | None:
    """The arguments of an hpc-supcon command, alone or under a launcher; None: another command."""
    words = shlex.split(line)
    for i, word in enumerate(words):
        if word == "hpc-supcon" or word.endswith("/hpc-supcon"):
            return words[i + 1 :]
        if words[i : i + 2] == ["-m", "hpc_supcon"]:
            return words[i + 2 :]
        if word.endswith("train.sbatch"):
            return words[i + 1 :]
    return None
