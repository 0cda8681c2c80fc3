"""README and docs: pages build without a broken link, commands and settings in them exist, Python in them runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from hpc_supcon import config as cfg
from hpc_supcon.cli.app import app
from hpc_supcon.errors import ConfigError
from hpc_supcon.models import build_encoder
from tests import notebooks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = re.compile(r"(?m)^    (?:\$ )?((?:\.venv/bin/)?hpc-supcon (?:[^\n\\]|\\\n|\\)*)")
REFUSED = re.compile(r"(?m)^    \$ hpc-supcon (?:run|config) (.*)\n    hpc-supcon: error: (.*)$")
OF_RUNS = ("run", "pretrain", "config")


def commands_of(page):
    """The words of each hpc-supcon command in the page's indented blocks, without comments and output."""
    for found in SHELL.findall(REFUSED.sub("", page.read_text(encoding="utf-8"))):
        line = found.replace("\\\n", " ").split("  #")[0].split(" #")[0]
        yield shlex.split(line)[1:]


def words(page):
    return [pytest.param(args, id=f"{page.stem}: {' '.join(args)[:60]}") for args in commands_of(page)]


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_links_to_what_exists():
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("arguments", [p for page in PAGES for p in words(page)])
def test_a_command_exists_with_these_options_and_settings(arguments):
    root = typer.main.get_command(app)
    context, command, rest = root.make_context("hpc-supcon", list(arguments)), root, list(arguments)
    while hasattr(command, "resolve_command") and rest:
        name, command, rest = command.resolve_command(context, rest)
        if hasattr(command, "resolve_command"):
            context = command.make_context(name, list(rest), parent=context)
        else:
            context = command.make_context(name, [a for a in rest if a != "..."], parent=context)
    overrides = [a for a in arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", a) and not a.endswith("...")]
    recipe = arguments[1] if arguments[0] in OF_RUNS and len(arguments) > 1 else "default"
    cfg.resolve("default", overrides)
    if recipe in cfg.recipe_names() and arguments[0] in OF_RUNS:
        cfg.load_config(recipe, overrides)


def test_refused_commands_are_refused_with_these_words():
    refused = [found for page in PAGES for found in REFUSED.findall(page.read_text(encoding="utf-8"))]
    assert len(refused) >= 3
    for words, message in refused:
        recipe, *overrides = shlex.split(words)
        with pytest.raises(ConfigError) as error:
            cfg.load_config(recipe, overrides, stages=("pretrain", "probe"))
        assert str(error.value) == message


def test_pages_have_commands():
    assert sum(len(words(page)) for page in PAGES) > 60


def python_blocks():
    for page in PAGES:
        for block in re.findall(r"(?s)```python\n(.*?)```", page.read_text(encoding="utf-8")):
            yield pytest.param(block, id=f"{page.stem}: {block.splitlines()[-1][:50]}")


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("resnet18", in_channels=3, image_size=32, stem="small")
    save_file(encoder.state_dict(), "NAME-encoder.safetensors")
    names = {}
    exec(compile(block, "block", "exec"), names)
    if "decoupled" in names:
        value = names["decoupled"](torch.nn.functional.normalize(torch.randn(8, 2, 4), dim=-1), torch.arange(8) % 3)
        assert value.ndim == 0
        assert torch.isfinite(value)


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
