"""Whatever the JSON of a run folder holds, its page is written: what makes no sense is left out."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_supcon.pages.compare import as_csv, as_latex, as_markdown, compare
from hpc_supcon.pages.page import render
from hpc_supcon.pages.read import read_runs
from hpc_supcon.pages.runs import page_of_runs
from tests.run_folders import write_run

KEYS = st.sampled_from(
    ["accuracy", "accuracy_interval", "samples", "splits", "test", "train", "classes", "confusion", "per_class", "f1",
     "errors", "clean", "mce", "size", "prune", "rate", "dense_bytes", "sparse_bytes", "probe", "stage", "x"]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6)
SECTIONS = st.sampled_from(["probes", "embedding", "ood", "corruptions"])
SCORES = st.dictionaries(
    SECTIONS, st.dictionaries(st.sampled_from(["linear", "knn", "encoder"]), OBJECTS, max_size=2)
)
FIELDS = st.sampled_from(
    ["time", "loss", "epoch", "images_per_s", "data_wait", "world_size", "train_images", "threads", "device",
     "steps_per_epoch", "parameters", "command", "validation_loss", "step_ms", "rest_ms"]
)  # fmt: skip
KINDS = st.sampled_from(
    ["start", "train", "validation", "end", "preempted", "profile", "probe/linear", "probe", "new"]
)
EVENTS = st.lists(st.tuples(KINDS, st.integers(), st.dictionaries(FIELDS, VALUES, max_size=5)), max_size=6)


@settings(max_examples=40)
@given(results=st.lists(OBJECTS, max_size=3), scores=SCORES, events=EVENTS, state=OBJECTS)
def test_any_json_gives_a_page_and_tables(tmp_path, results, scores, events, state):
    folder = tmp_path / "run"
    if not folder.exists():
        write_run(folder)
    (folder / "results.json").write_text(json.dumps({"results": results}))
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "checkpoints/step-20/state.json").write_text(json.dumps(state))
    lines = [{**fields, "event": kind, "step": step} for kind, step, fields in events]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "</html>" in render(page_of_runs([folder]))
    comparison = compare(read_runs([folder]))
    for write in (as_csv, as_latex, as_markdown):
        write(comparison)
