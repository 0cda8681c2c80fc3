"""What the documentation says of Slurm, typed on a cluster."""

from __future__ import annotations

import json
import os

from tests.docs import reader, shell
from tests.docs.pages import ROOT
from tests.docs.typed_page import type_page, typed_blocks

WAIT = "while [[ $(squeue --noheader) ]]; do sleep 0.2; done\n"


def test_the_page_of_slurm(cluster, tmp_path):
    page = ROOT / "docs/guides/slurm.md"
    variables = {name: os.environ[name] for name in ("SLURM_CONF", "PYTHONPATH")} | {shell.MASTER: "127.0.0.1"}
    with shell.serving() as server:
        own = reader.things(tmp_path / "own", server, runs=False)
        here = type_page(typed_blocks(page, ["slurm"]), own, server, tmp_path, WAIT, **variables)
    for run in ("runs/a", "runs/b"):
        events = [json.loads(line) for line in (here / run / "metrics.jsonl").read_text().splitlines()]
        assert events[0]["world_size"] == 4
        assert (here / run / "results.json").is_file()
    cells = list((here / "grids/first/runs").iterdir())
    assert len(cells) == 2
    assert all((cell / "results.json").is_file() for cell in cells)
