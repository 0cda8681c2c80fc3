"""All of `hpc-supcon bench gpu`, in miniature on a CPU, in real processes."""

from __future__ import annotations

import pytest

from hpc_supcon.bench.gpu.plan import STAGES
from hpc_supcon.bench.gpu.record import DONE, read
from hpc_supcon.cli import main
from tests.loaders.contract import write_folder


@pytest.mark.timeout(1800)
def test_every_stage_measures_and_the_page_shows_it(tmp_path):
    data = write_folder(tmp_path / "jpegs", suffix="jpg", size=(16, 16))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        # far more than it takes, however busy the machine is: what is measured does not depend on it
        main(["bench", "gpu", "--device", "cpu", "--budget", "3000", "--data", str(data), "--out", str(out)])
    page = (out / "report.md").read_text()
    assert not done.value.code, page
    stages = {stage.name: read(out / stage.file) for stage in STAGES}
    assert {found["status"] for found in stages.values()} == {DONE}
    tables = {name: rows for found in stages.values() for name, rows in found["tables"].items()}
    assert {row["name"] for row in tables["loss"]} >= {"dense", "tiled"}
    assert {row["name"] for row in tables["loaders"]} >= {"resident", "torch"}
    assert [row["mode"] for row in tables["step"]] == ["eager"]
    assert len(tables["views"]) == 4
    assert [row["what"] for row in tables["save"]][-1] == "stall"
    assert all(row["equal"] for row in tables["runs"])
    assert [row["probe"] for row in tables["accuracy"]] == ["knn"]
    assert stages["tests"]["facts"]["skipped"] > 20
    assert (out / stages["step"]["facts"]["trace"]).stat().st_size > 1000
    assert len(list(out.iterdir())) == 8
    for stage in STAGES:
        assert f"## {stage.title}" in page
