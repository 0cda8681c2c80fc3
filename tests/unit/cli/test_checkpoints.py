"""`hpc-supcon checkpoints`: what is saved, whether it is sound, and an exit code for scripts."""

from __future__ import annotations

import json
import os
from datetime import datetime

import pytest
import torch

from hpc_supcon import checkpoint, cli


@pytest.fixture
def run_dir(tmp_path):
    for step in (5, 10, 100):
        path = checkpoint.save_checkpoint(
            tmp_path / "r" / "checkpoints", step, {"model": {"w": torch.zeros(500)}}, {}, world_size=2,
            config_digest="d", keep=3,
        )  # fmt: skip
        os.utime(path / "manifest.json", (1.7e9 + step, 1.7e9 + step))
    return tmp_path / "r"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(["checkpoints", *map(str, arguments)])
    return left.value.code, *capsys.readouterr()


def damage(run_dir, step):
    path = run_dir / "checkpoints" / f"step-{step}" / "model.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)


def test_a_sound_run_is_listed_and_leaves_with_0(capsys, run_dir):
    code, out, err = call(capsys, run_dir)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if "verified" in line]
    size = sum(p.stat().st_size for p in (run_dir / "checkpoints" / "step-5").iterdir())
    assert [line[1] for line in lines] == ["5", "10", "100"]
    assert f"{size:,}" in lines[0]
    assert datetime.fromtimestamp(1.7e9 + 5).strftime("%Y-%m-%d") in out


def test_json_has_every_number(capsys, run_dir):
    damage(run_dir, 10)
    code, out, _ = call(capsys, run_dir, "--json")
    rows = json.loads(out)
    assert code == 1
    assert [(row["step"], row["verified"], row["world_size"]) for row in rows] == [
        (5, True, 2), (10, False, 2), (100, True, 2),
    ]  # fmt: skip
    assert rows[1]["problem"].endswith("model.safetensors: its bytes changed since it was written (sha256 differs)")
    assert datetime.fromisoformat(rows[0]["written"]).timestamp() == 1.7e9 + 5
    assert [row["problem"] is None for row in rows] == [True, False, True]
    assert rows[0]["path"] == str(run_dir / "checkpoints" / "step-5")


def test_a_damaged_one_is_named_and_leaves_with_1_and_all_damaged_with_2(capsys, run_dir):
    damage(run_dir, 100)
    code, out, _ = call(capsys, run_dir)
    assert code == 1
    assert out.count(" damaged ") == 1
    assert f"step 100: {run_dir}/checkpoints/step-100/model.safetensors: its bytes changed" in out
    for step in (5, 10):
        damage(run_dir, step)
    code, out, err = call(capsys, run_dir)
    assert code == 2
    assert out.count(" damaged ") == 3
    assert err == f"hpc-supcon: error: {run_dir}: none of 3 checkpoints can be loaded\n"


def test_without_verifying_a_flipped_bit_passes_and_a_missing_file_does_not(capsys, run_dir):
    damage(run_dir, 100)
    code, out, _ = call(capsys, run_dir, "--no-verify", "--json")
    assert code == 0
    assert [row["verified"] for row in json.loads(out)] == [None, None, None]
    (run_dir / "checkpoints" / "step-5" / "state.json").unlink()
    code, out, _ = call(capsys, run_dir, "--no-verify")
    assert code == 1
    assert "state.json: No such file" in out
    assert "sizes match" in out


@pytest.mark.parametrize("manifest", [b"", b"\xff", b"[]"])
def test_an_unreadable_manifest_or_a_file_in_its_place_is_a_row(capsys, run_dir, manifest):
    (run_dir / "checkpoints" / "step-5" / "manifest.json").write_bytes(manifest)
    (run_dir / "checkpoints" / "step-7").write_text("a file")
    code, out, _ = call(capsys, run_dir, "--json")
    assert code == 1
    assert [(r["step"], r["world_size"], r["verified"]) for r in json.loads(out)] == [
        (5, None, False), (7, None, False), (10, 2, True), (100, 2, True),
    ]  # fmt: skip


def test_no_checkpoint_yet_is_no_error_and_no_run_folder_is_one(capsys, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("")
    assert call(capsys, tmp_path / "new") == (0, f"{tmp_path}/new: no checkpoint yet\n", "")
    assert call(capsys, tmp_path / "new", "--json") == (0, "[]\n", "")
    code, _, err = call(capsys, tmp_path)
    assert code == 2
    assert f"{tmp_path}: neither config.yaml nor checkpoints in it" in err
