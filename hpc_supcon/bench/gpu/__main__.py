"""One stage, in a process of its own: `python -m hpc_supcon.bench.gpu` as `runner` starts it."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from ...errors import HpcSupconError
from .plan import MARGIN_S, STAGES
from .record import Record
from .work import Work


def main() -> None:
    """Exit codes as of any command; 1 where something could not be measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=[stage.name for stage in STAGES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    stage = next(stage for stage in STAGES if stage.name == given.stage)
    record = Record.load(given.out / stage.file)
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device(given.device)
    work = Work(record, device, given.deadline, given.out, given.data)
    if work.threads:
        torch.set_num_threads(work.threads)
    # where it hangs, in what is kept of stderr; the kill comes soon after
    faulthandler.dump_traceback_later(max(1.0, given.deadline + MARGIN_S / 2 - time.monotonic()))
    try:
        import_module(f"{__package__}.{stage.name}_stage").run(work)
    except HpcSupconError as error:
        sys.exit(f"hpc-supcon: error: {error}")
    if work.failed:
        sys.exit(f"failed: {', '.join(work.failed)}")


if __name__ == "__main__":
    main()
