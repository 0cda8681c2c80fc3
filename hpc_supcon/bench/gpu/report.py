"""The page: tables of what the stages measured, of what not and why, and of the targets; made from their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...files import write_atomically
from .plan import STAGES
from .record import FAILED, NO_TIME, RUNNING, TOO_SLOW, read
from .targets import judge

REPORT = "report.md"
Format = Callable[[Any], str]
Columns = Sequence[tuple[str, str, Format]]
"""(key of the row, heading, how its value is written)."""


def _number(digits: int, factor: float = 1.0) -> Format:
    return lambda value: "" if value is None else f"{factor * value:,.{digits}f}"


def _sci(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"


TABLES: dict[str, Columns] = {
    "ceilings": [("what", "", str), ("rate", "rate", _number(1)), ("unit", "", str)],
    "loss": [
        ("name", "loss", str), ("n", "N", _number(0)), ("d", "D", _number(0)),
        ("forward_s", "forward ms", _number(3, 1e3)), ("backward_s", "backward ms", _number(3, 1e3)),
        ("seconds", "both ms", _number(3, 1e3)), ("seconds_worst", "worst ms", _number(3, 1e3)),
        ("host_s", "host us", _number(0, 1e6)), ("host_waits", "waits", _number(0)),
        ("tflops", "TFLOP/s", _number(1)), ("extra_bytes", "peak MB", _number(1, 1e-6)),
        ("gradient_error", "gradient error", _sci),
    ],
    "step": [
        ("encoder", "encoder", str), ("image_size", "px", _number(0)), ("mode", "mode", str),
        ("precision", "precision", str), ("batch_size", "images", _number(0)), ("views_per_s", "views/s", _number(0)),
        ("views_per_s_worst", "worst", _number(0)), ("encoder_share", "encoder's share", "{:.0%}".format),
        ("host_s", "host ms", _number(2, 1e3)), ("host_waits", "waits", _number(0)),
        ("peak_bytes", "peak GB", _number(2, 1e-9)),
    ],
    "views": [
        ("policy", "policy", str), ("image_size", "px", _number(0)), ("images", "images", _number(0)),
        ("views_per_s", "views/s", _number(0)),
    ],
    "loaders": [
        ("name", "loader", str), ("data", "data", str), ("policy", "policy", str), ("image_size", "px", _number(0)),
        ("batch_size", "batch", _number(0)), ("workers", "workers", _number(0)),
        ("images_per_s", "images/s, two views each", _number(0)), ("cpu_ms_per_image", "CPU ms an image", _number(3)),
    ],
    "runs": [("what", "runs", str), ("sha256", "sha256", str), ("other", "other", str), ("equal", "equal", str)],
    "save": [("what", "", str), ("ms", "ms", _number(1))],
    "accuracy": [
        ("data", "data", str), ("encoder", "encoder", str), ("epochs", "epochs", _number(0)),
        ("seconds", "seconds in all", _number(0)), ("probe", "probe", str), ("accuracy", "test accuracy", _number(4)),
    ],
}  # fmt: skip


def write_report(folder: Path) -> None:
    """Write folder/report.md from the files of the stages there. Raises OutputError."""
    stages = {stage.name: read(folder / stage.file) for stage in STAGES if (folder / stage.file).exists()}
    if not stages:
        raise OutputError(f"{folder}: holds no numbers of `hpc-supcon bench gpu`")
    try:
        write_atomically(folder / REPORT, page(stages), durable=False)
    except OSError as error:
        raise OutputError(f"{folder / REPORT}: cannot be written: {error.strerror or error}") from None


def page(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page; `stages`: the content of the files, by stage."""
    lines = ["# `hpc-supcon bench gpu`", "", *_machine(stages.get("machine", {}).get("facts", {})), "## Targets", ""]
    words = {True: "yes", False: "**no**", None: "not measured"}
    targets = [(t.text, t.measured, words[t.met]) for t in judge(stages)]
    lines += [*table(("target", "measured", "met"), targets), ""]
    for stage in STAGES:
        content = stages.get(stage.name)
        lines += [f"## {stage.title}", ""]
        lines += ["This stage did not run.", ""] if content is None else _stage(content)
    return "\n".join(lines).rstrip() + "\n"


def _machine(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    named = {
        "Python": facts["python"], "PyTorch": facts["torch"], "CUDA": facts.get("cuda"), "cuDNN": facts.get("cudnn"),
        "NCCL": facts.get("nccl"), **facts["packages"],
    }  # fmt: skip
    about = [f"{facts['device']}", f"{facts['cores']} CPU cores"]
    if "memory_gib" in facts:
        about += [
            f"compute capability {facts['capability']}", f"{facts['multiprocessors']} multiprocessors",
            f"{facts['memory_gib']} GiB ({facts['memory_free_gib']} free)",
        ]  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in named.items() if number)
    return [f"{', '.join(about)}.", "", f"{versions}.", ""]


def _stage(content: Mapping[str, Any]) -> list[str]:
    lines = [f"{_ending(content)}.", ""]
    if content["stage"] == "tests" and content["facts"]:
        lines += [_tests(content["facts"]), ""]
    for name, rows in content["tables"].items():
        columns = [column for column in TABLES[name] if any(row.get(column[0]) is not None for row in rows)]
        cells = [[written(row.get(key)) for key, _, written in columns] for row in rows]
        lines += [*table([heading for _, heading, _ in columns], cells), ""]
    if content["facts"].get("trace"):
        lines += [f"Trace of one step: {content['facts']['trace']}, for ui.perfetto.dev.", ""]
    missing = [(entry["what"], entry["why"]) for entry in content["skipped"]]
    missing += [(entry["what"], f"failed: {entry['error']}") for entry in content["failures"]]
    if missing:
        lines += [*table(("not measured", "why"), missing), ""]
    if content["status"] in (FAILED, TOO_SLOW) and content.get("stderr"):
        lines += ["```", *content["stderr"], "```", ""]
    return lines


def _ending(content: Mapping[str, Any]) -> str:
    seconds, limit = f"{content['seconds']:.0f} s", f"{content['limit_s']:.0f} s"
    return {
        RUNNING: "Cut off together with the whole command",
        FAILED: f"**Failed** after {seconds} with exit code {content.get('exit_code')}",
        TOO_SLOW: f"**Killed** at its limit of {limit}; what it had measured is below",
        NO_TIME: "Not started: too few seconds were left",
    }.get(content["status"], f"{seconds} of at most {limit}")


def _tests(facts: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{facts[name]} {name}" for name in ("passed", "failed", "error", "skipped") if name in facts)
    failed = "".join(f"\n- {name}" for name in facts.get("failed_tests", []))
    return f"{counts or 'no tests'}.{failed}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; a bar in a cell does not end it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines]
