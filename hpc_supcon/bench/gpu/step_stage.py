"""Stage step: views/s, memory, phases and waits of the training step, with training's own flags, and one trace."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from ...config import Config
from ...distributed.launch import start
from ...training.engine import check_engine
from ..common import host_waits
from ..step import measure_row
from ..step_session import OUT_OF_MEMORY, StepRow, StepSession, step_config
from .work import Work

TRACE = "step-trace.json.gz"
MODES = {"eager": [], "compile": [], "cuda_graphs": ["train.cuda_graphs=true"]}
"""The settings of each, besides train.compile."""


@dataclass(frozen=True)
class Case:
    """An encoder on images of one size."""

    encoder: str
    image_size: int
    batch_size: int
    """In images; halved while memory does not suffice."""
    precision: str = "bf16"
    images: int = 4096
    seconds: float = 3.0
    compiles_s: float = 40.0
    """About the seconds that compiling takes."""

    @property
    def overrides(self) -> list[str]:
        return [
            f"data.synthetic.image_size={self.image_size}",
            f"data.synthetic.images={max(self.images, self.batch_size)}",
        ]  # fmt: skip


ON_CUDA = (Case("resnet18", 32, 2048), Case("resnet50", 224, 256, images=1024, compiles_s=70.0))
ON_CPU = Case("conv", 8, 8, "fp32", images=64, seconds=0.01)
EAGER_S = 10.0
"""About the seconds that a case takes without compiling."""


def run(work: Work) -> None:
    # what takes longest comes last
    small, large = ON_CUDA
    plan = [(small, "eager"), (large, "eager"), (small, "compile"), (small, "cuda_graphs"), (large, "compile")]
    plan = [(ON_CPU, "eager")] if work.is_small else [*plan, (large, "cuda_graphs")]
    if work.is_small:
        work.record.skip("compile and cuda_graphs", "on a GPU only")
    with start(device=work.kind, threads=work.threads) as runtime:
        for case, mode in plan:
            what = f"{case.encoder} {case.image_size} px, {mode}"
            seconds = EAGER_S + (case.compiles_s if mode != "eager" else 0)
            if work.has_time(what, 1 if work.is_small else seconds):
                with work.measuring(what):
                    check_engine(_config(case, mode), runtime)
                    _measure(work, case, mode)
                torch.compiler.reset()
                gc.collect()


def _config(case: Case, mode: str) -> Config:
    overrides = [*case.overrides, *MODES[mode]]
    return step_config(case.encoder, case.precision, mode != "eager", case.batch_size, overrides)


def _measure(work: Work, case: Case, mode: str) -> None:
    """Add the row of one case at its largest batch that fits."""
    found: dict[str, object] = {}

    def then(session: StepSession) -> None:
        found.update(_around(work, session, trace=(case, mode) in ((ON_CPU, "eager"), (ON_CUDA[0], "eager"))))

    size = case.batch_size
    while size >= 1:
        sized = replace(case, batch_size=size)
        row = StepRow(case.encoder, case.precision, mode != "eager", size, "")
        measured = measure_row(row, [*sized.overrides, *MODES[mode]], work.device, case.seconds, then=then)
        if measured.fits:
            print(f"{case.encoder} {case.image_size} px {mode}: {measured.views_per_s:,.0f} views/s", flush=True)
            work.record.row("step", mode=mode, image_size=case.image_size, **asdict(measured), **found)
            return
        work.record.skip(f"{case.encoder} {case.image_size} px, {mode}, batch {size}", OUT_OF_MEMORY)
        size //= 2


def _around(work: Work, session: StepSession, *, trace: bool) -> dict[str, object]:
    """What the phases do not tell: the host's time of a step, and how often it waits for the device."""
    one = partial(session.run, 1)
    host = []
    for _ in range(5):
        if work.kind == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        one()
        host.append(time.perf_counter() - began)
    waits = host_waits(one, work.device)
    if trace:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if work.kind == "cuda" else []
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            one()
        profile.export_chrome_trace(str(work.out / TRACE))
        work.record.fact(trace=TRACE)
    return {"host_s": min(host), "host_waits": waits}
