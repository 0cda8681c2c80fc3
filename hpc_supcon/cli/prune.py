"""The command `hpc-supcon prune`: pruned copies of a run's encoder, fine-tuned, probed, their size measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..run_folder import RESULTS, read_config
from ..stages.start import refused_together, started
from ..terminal import output
from .common import Debug

ABOUT = ("method", "scope", "schedule")
HEADINGS = {key: key for key in (*ABOUT, "label", "loss", "rewind")}
HEADINGS |= {"finetune_steps": "steps", "finetune_loss": "by loss"}
"""Keys of a pruning that have a column of their own where not all are alike -> its heading."""
FEATURES = {"knn": "kNN", "silhouette": "silhouette"}


def prune(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder with a trained encoder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings, such as prune.rate=[0.2,0.5].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume prunings that were started before.")] = False,
    debug: Debug = False,
) -> None:
    """Prune a run's encoder to each rate of prune.rate, into RUN_DIR/pruned/; fine-tune, probe, measure its size."""
    with refused_together():
        settings = read_config(run_dir, overrides or [], stages=("prune",))
        from ..evaluation.encoder import check_has_encoder
        from ..stages.prune import check_prune
        from ..stages.prune import prune as prune_run

        check_prune(run_dir, settings, resume=resume)
        check_has_encoder(run_dir)  # before decoding the data, which takes minutes
    command = {"command": "prune", "RUN_DIR": run_dir.absolute(), "--resume": "yes" if resume else "no"}
    with started(settings, ("prune",), command, resume=True, folder=run_dir) as (runtime, data):
        from ..stages.results import ResultWriter

        writer = ResultWriter()
        results = prune_run(run_dir, settings, runtime, data, resume=resume, writer=writer)
        if runtime.is_main:
            _print(run_dir, results)
        writer.check()


def _print(run_dir: Path, results: list[dict[str, Any]]) -> None:
    """A row for each rate and probe, those of earlier prunings of the same checkpoint included."""
    first = results[0]
    about = first["prune"]
    rows = sorted(_with_earlier(run_dir, results), key=_order)
    table = Table(
        title=f"{first['encoder']}, {read_config(run_dir).loss.label} ({about['dense_checkpoint']}): "
        f"{_shared(rows)}{_weights(rows)}",
        caption=f"the encoder as dense safetensors: {_original(first):,} bytes; x: times smaller",
        caption_justify="left",
    )
    varying = [key for key in HEADINGS if len({row["prune"].get(key) for row in rows}) > 1]
    headings = [HEADINGS[key] for key in varying]
    sizes = ["gzip", "sparse"]
    if any(_original(row) != row["size"]["dense_bytes"] for row in rows):
        sizes.insert(0, "dense")  # some have fewer channels
    headings += ["rate", "zeros", "MACs left", *(h for size in sizes for h in (f"{size} bytes", "x"))]
    headings += ["probe", "validation", "test", "F1"]
    features = {key: title for key, title in FEATURES.items() if any(_feature(row, key) is not None for row in rows)}
    headings += features.values()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("probe", *varying) else "right", no_wrap=True)
    for row in rows:
        size, scores = row["size"], (row["validation"], row["test"])
        table.add_row(
            *(str(row["prune"].get(key) or "") for key in varying),
            f"{row['prune']['rate']:g}",
            f"{row['prune']['zeros']:,}",
            f"{cost['nonzero_macs'] / cost['dense_macs']:.1%}" if (cost := row.get("cost")) else "",
            *(
                t
                for key in sizes
                for t in (f"{size[f'{key}_bytes']:,}", f"{_original(row) / size[f'{key}_bytes']:.2f}")
            ),
            row["probe"],
            *("" if score is None else f"{score['accuracy']:.4f}" for score in scores),
            "" if row["test"] is None else f"{row['test']['f1']:.4f}",
            *("" if (score := _feature(row, key)) is None else f"{score:.4f}" for key in features),
        )
    console = output()
    console.print(table)
    for line in _times(results):
        console.print(line, soft_wrap=True)
    console.print(f"results: {run_dir / RESULTS}", soft_wrap=True)


def _weights(rows: list[dict[str, Any]]) -> str:
    """How many weights there are, where all rows have the same number."""
    numbers = {row["prune"]["weights"] for row in rows}
    return f"of {numbers.pop():,} weights" if len(numbers) == 1 else "of the encoder"


def _original(row: dict[str, Any]) -> int:
    """Bytes of the encoder's safetensors file before channels were removed; entries of before there was such a method
    do not say it."""
    return int(row["size"].get("original_bytes", row["size"]["dense_bytes"]))


def _times(results: list[dict[str, Any]]) -> list[str]:
    """A line for each rate whose encoder was timed: milliseconds of a pass, of the dense and of the pruned one."""
    lines = {}
    for row in results:
        if row["cost"]["latency"] is None:
            continue
        before, after = row["cost"]["latency"].values()
        parts = [
            f"{batch} image{'s' * (batch != '1')} {a['median_ms']:.3g} -> {b['median_ms']:.3g} ms "
            f"({a['median_ms'] / b['median_ms']:.2f} times faster)"
            if (a := before[batch]) and (b := after[batch])
            else f"{batch} images: not timed, too slow or too large"
            for batch in before
        ]
        lines[row["folder"]] = f"{row['folder']}: {'; '.join(parts)}"
    return list(lines.values())


def _feature(row: dict[str, Any], key: str) -> float | None:
    """Entries of earlier versions do not have them."""
    found: float | None = row.get("features", {}).get(key)
    return found


def _with_earlier(run_dir: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`results`, and the other entries of pruning in results.json that are of the same checkpoint and probes."""
    about, probes = results[0]["prune"], {result["probe"] for result in results}
    folders = {result["folder"] for result in results}
    try:
        entries = json.loads((run_dir / RESULTS).read_text(encoding="utf-8"))["results"]
        earlier = [
            entry
            for entry in entries
            if entry["stage"] == "prune"
            and entry["folder"] not in folders
            and entry["probe"] in probes
            and entry["prune"]["dense_checkpoint"] == about["dense_checkpoint"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return results  # they could not be written, which the command tells
    return [*results, *earlier]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(str(row["prune"].get(key) or "") for key in ABOUT), row["prune"]["rate"], row["folder"], row["probe"])


def _shared(rows: list[dict[str, Any]]) -> str:
    """Method, scope and schedule, as far as all rows have the same."""
    shared = [{row["prune"].get(key) for row in rows} for key in ABOUT]
    return "".join(f"{values.pop()}, " for values in shared if len(values) == 1 and values != {None})
