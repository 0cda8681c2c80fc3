"""The documentation's first page, typed into a shell in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "index.md"


def section(text, heading):
    return re.split(r"(?m)^## ", text.partition(f"## {heading}\n")[2])[0]


def blocks(text):
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


def test_the_commands_of_the_first_page_run_as_printed(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    script = "\n".join(blocks(section(text, heading)) for heading in ("A first run", "What to do with it"))
    assert script.count("hpc-supcon") == 5
    assert "torchrun" in script
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    line = ["bash", "-e", "-u", "-o", "pipefail", "-c", script]
    done = subprocess.run(
        line, check=False, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*")}
    assert {"runs/first/report.html", "runs/two-ranks/results.json", "both.html"} <= found
    assert "knn" in done.stdout
    assert any(name.startswith("runs/first/pruned/l1-global-") for name in found)
