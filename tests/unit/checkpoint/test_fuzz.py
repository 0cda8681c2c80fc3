"""Any bytes in a checkpoint load or raise CheckpointCorrupt, and never open a file outside of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_supcon import checkpoint
from hpc_supcon.errors import CheckpointCorrupt

fuzz = settings(max_examples=150)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "../step-1/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.json", "manifest.json", "state.json",
        "state.json\0", "..\\x.json", "model.safetensors", "missing.json", "é.json", "a" * 300 + ".json", "x.txt",
    ]
) | st.text(max_size=6)  # fmt: skip


def write_json(path, data, *, seal=True):
    """Write JSON as in checkpoints; sealed by default, to test the checks after that of the hash."""
    text = json.dumps(data, indent=1, sort_keys=True)
    if seal and isinstance(data, dict):
        data = {**data, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        text = json.dumps(data, indent=1, sort_keys=True)
    path.write_bytes(text.encode())


@pytest.fixture
def path(tmp_path):
    model = {"w": torch.arange(9.0)}
    return checkpoint.save_checkpoint(tmp_path, 3, {"model": model}, {"classes": []}, world_size=1, config_digest="")


@pytest.fixture
def manifest(path):
    data = json.loads((path / "manifest.json").read_bytes())
    del data["sha256"]
    return data


def load_or_refuse(path):
    """Load, or return None for a CheckpointCorrupt of one line; every file that is opened is in the folder."""
    opened, original, message = [], os.open, "one line"

    def watched(name, *args, **kwargs):
        opened.append(Path(name))
        return original(name, *args, **kwargs)

    os.open = watched
    try:
        return checkpoint.load_checkpoint(path)
    except CheckpointCorrupt as error:
        message = str(error)
        return None
    finally:
        os.open = original
        assert len(message.splitlines()) == 1
        assert {p.parent for p in opened} == {path}
        assert all(p.name.isascii() and os.sep not in p.name for p in opened)


@fuzz
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_a_manifest(path, payload):
    (path / "manifest.json").write_bytes(payload)
    assert load_or_refuse(path) is None


@fuzz
@given(JSON)
def test_random_sealed_json_is_refused_as_a_manifest(path, data):
    write_json(path / "manifest.json", data)
    assert load_or_refuse(path) is None


@fuzz
@given(st.sampled_from(["format", "step", "world_size", "config_digest", "files", "more"]), JSON)
def test_one_field_of_another_type_or_value(path, manifest, field, value):
    write_json(path / "manifest.json", {**manifest, field: value})
    found = load_or_refuse(path)
    # what may vary without harm: how many ranks, and the digest's text
    harmless = (field == "world_size" and type(value) is int and value > 0) or (
        field == "config_digest" and isinstance(value, str)
    )
    assert (found is not None) == harmless or manifest[field] == value


@fuzz
@given(st.dictionaries(NAMES, JSON | st.fixed_dictionaries({"bytes": JSON, "sha256": JSON}), min_size=1, max_size=3))
def test_hostile_files(path, manifest, files):
    write_json(path / "manifest.json", {**manifest, "files": {**manifest["files"], **files}})
    found = load_or_refuse(path)
    assert found is None or found.manifest["files"] == manifest["files"]


@pytest.mark.parametrize("size", [-1, 10**18, 10**30, 2**63, True, None, 1.0, "9", float("nan"), float("inf")])
def test_hostile_sizes(path, manifest, size):
    entry = {**manifest["files"]["model.safetensors"], "bytes": size}
    write_json(path / "manifest.json", {**manifest, "files": {**manifest["files"], "model.safetensors": entry}})
    assert load_or_refuse(path) is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"a":' * 100_000, '{"files": ' + "9" * 10_000 + "}", '{"step": NaN}', "\ufeff{}", "{}" * 2,
        '{"step": 1e999}', '{"step": 1, "step": 2}', " " * (1 << 20) + "{}", '"\\ud800"', "nul", "-", "{,}",
    ],
)  # fmt: skip
def test_hostile_texts(path, text):
    (path / "manifest.json").write_bytes(text.encode())
    assert load_or_refuse(path) is None


def test_a_duplicate_key_with_a_correct_hash_is_refused(path, manifest):
    write_json(path / "manifest.json", manifest)
    assert load_or_refuse(path) is not None
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 3', '"step": 3,\n "step": 3'))
    assert load_or_refuse(path) is None


def put(path, manifest, name, payload):
    """Write a file of any content, with a correct manifest."""
    (path / name).write_bytes(payload)
    entry = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    write_json(path / "manifest.json", {**manifest, "files": {**manifest["files"], name: entry}})


@fuzz
@given(st.binary(max_size=100) | JSON.map(lambda data: json.dumps(data, indent=1, sort_keys=True).encode()))
def test_only_a_mapping_with_the_right_step_is_accepted_as_a_state(path, manifest, payload):
    good = (path / "state.json").read_bytes()
    try:
        put(path, manifest, "state.json", payload)
        assert load_or_refuse(path) is None
        state = json.dumps({"step": 3, "more": None}, indent=1, sort_keys=True).encode()
        put(path, manifest, "state.json", state)
        assert load_or_refuse(path) is not None
    finally:
        (path / "state.json").write_bytes(good)


@pytest.mark.parametrize("step", ["null", "3.0", '"3"', "true", "4", "-3", "NaN", "[3]"])
def test_a_state_of_another_step_is_refused(path, manifest, step):
    good = (path / "state.json").read_bytes()
    put(path, manifest, "state.json", b'{\n "step": ' + step.encode() + b"\n}")
    assert load_or_refuse(path) is None
    (path / "state.json").write_bytes(good)


@fuzz
@given(
    st.binary(max_size=60)
    | st.dictionaries(
        st.text(max_size=4),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F64", "BOOL", "C64", "F4", "U8", "X", 3]),
                "shape": st.lists(st.integers(-2, 2**64) | st.integers(0, 3), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 2**64) | st.integers(0, 16), max_size=3),
            }
        ),
        max_size=3,
    ).map(lambda header: (text := json.dumps(header).encode()) and len(text).to_bytes(8, "little") + text + bytes(16))
)
@example(b'\x0c\x00\x00\x00\x00\x00\x00\x00 {"":["\\r"]}')  # the library's message has the line break in it
def test_random_bytes_do_not_crash_the_tensor_reader(path, manifest, payload):
    put(path, manifest, "model.safetensors", payload)
    load_or_refuse(path)
