"""Every code block of README and docs is run as it is printed, or says in the page why it is not."""

from __future__ import annotations

import pytest

from hpc_supcon import config as cfg
from hpc_supcon.config import yaml12
from hpc_supcon.grid.cells import load
from hpc_supcon.grid.expand import expand
from tests.docs.pages import LANGUAGES, PAGES, ROOT, blocks, blocks_of
from tests.docs.typed_page import type_page, typed_blocks

OF_GRIDS = ("axes", "include")


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_block_is_run_or_says_why_not(block):
    assert block.language in LANGUAGES, f"{block}: an unknown language; use one of {', '.join(LANGUAGES)}"
    if block.language == "text":
        assert {"not run", "printed by"} & set(block.remarks), f"{block}: what prints this? <!-- printed by: ... -->"
    if block.language == "yaml":
        assert block.is_run, f"{block}: a YAML block can always be read"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_is_a_configuration_or_a_grid(block, tmp_path):
    path = tmp_path / (block.title or "block.yaml")
    path.write_text(block.text)
    if set(OF_GRIDS) & set(yaml12.loads(block.text, str(block))):
        expand(load(path))
    else:
        cfg.load_config(path, stages=("pretrain", "probe"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_typed_into_a_shell(page, own, server, tmp_path):
    type_page(typed_blocks(page), own, server, tmp_path)


def test_most_blocks_are_run():
    found = blocks()
    assert len(found) > 50
    assert sum(block.is_run for block in found) > 0.6 * len(found)
