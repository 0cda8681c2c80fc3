"""README and docs: pages build without a broken link; commands and settings in them exist. tests/docs types them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer

from hpc_supcon import config as cfg
from hpc_supcon.cli.app import app
from hpc_supcon.grid.cells import load
from hpc_supcon.grid.expand import expand
from tests import notebooks
from tests.docs.pages import PAGES, ROOT, blocks, of_hpc_supcon

OF_RUNS = ("run", "pretrain", "config")
INLINE = re.compile(r"`(hpc-supcon [^`]*)`")


def commands():
    """The arguments of each hpc-supcon command, in blocks (but those that are refused) and in the text."""
    for block in blocks("sh", "console"):
        for line in block.lines_of_commands():
            if (arguments := of_hpc_supcon(line)) and f"{line}\nhpc-supcon: error:" not in block.text:
                yield pytest.param(arguments, id=f"{block}: {' '.join(arguments)[:60]}")
    for page in PAGES:
        text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
        for line in INLINE.findall(text):
            arguments = shlex.split(line)[1:]
            yield pytest.param(arguments, id=f"{page.stem}: {' '.join(arguments)[:60]}")


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_links_to_what_exists():
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("arguments", list(commands()))
def test_a_command_exists_with_these_options_and_settings(arguments):
    root = typer.main.get_command(app)
    if arguments == ["--version"]:  # ends the program where it is read
        assert "--version" in {name for option in root.params for name in option.opts}
        return
    context, command, rest = root.make_context("hpc-supcon", list(arguments)), root, list(arguments)
    while hasattr(command, "resolve_command") and rest:
        name, command, rest = command.resolve_command(context, rest)
        if rest or hasattr(command, "resolve_command"):
            context = command.make_context(name, [a for a in rest if a != "..."], parent=context)
    overrides = [a for a in arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", a) and not a.endswith("...")]
    recipe = arguments[1] if arguments[0] in OF_RUNS and len(arguments) > 1 else "default"
    cfg.resolve("default", overrides)
    if recipe in cfg.recipe_names() and arguments[0] in OF_RUNS:
        cfg.load_config(recipe, overrides)
    if arguments[:2] in (["grid", "submit"], ["grid", "expand"]) and arguments[2].startswith("launch/"):
        expand(load(ROOT / arguments[2]), overrides)


def test_pages_have_commands():
    assert len(list(commands())) > 70


def test_the_site_builds_without_a_warning(tmp_path):
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "site" / "reference" / "settings.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in settings for key in cfg.flatten(cfg.load_config()))
    assert "hpc-supcon grid submit" in (tmp_path / "site" / "reference" / "cli.html").read_text(encoding="utf-8")
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert not requests_to_others(page.read_text(encoding="utf-8")), page
    for name in notebooks.NAMES:
        page = (tmp_path / "site" / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        pictures = re.findall(rf'src="({name}_files/[^"]+)"', page)
        assert pictures
        assert all((tmp_path / "site" / "notebooks" / picture).is_file() for picture in (*pictures, f"{name}.ipynb"))


LOADS = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed|object)\b[^>]*?\b(?:src|data)=["']?((?:https?:)?//[^"'\s>]+)"""
)
LINKED = re.compile(
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon|modulepreload))[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
)


def requests_to_others(page):
    """Addresses that a browser asks for when it shows the page: links that a reader may follow are none."""
    return [*LOADS.findall(page), *LINKED.findall(page), *re.findall(r"@import\s+url\(([^)]+)\)", page)]


def test_requests_to_other_hosts_are_found():
    for text in (
        '<script src="https://cdnjs.cloudflare.com/x.js"></script>',
        "<img alt=a src='//x.org/a.png'>",
        '<link href="https://fonts.googleapis.com/css" rel="stylesheet">',
        '<link rel="preconnect" href="https://fonts.gstatic.com">',
        "<style>@import url(https://x.org/a.css)</style>",
    ):
        assert len(requests_to_others(text)) == 1, text
    for text in (
        '<a href="https://x.org">x</a>',
        '<script src="../a.js">',
        '<link rel="canonical" href="https://x.org">',
    ):
        assert not requests_to_others(text), text
