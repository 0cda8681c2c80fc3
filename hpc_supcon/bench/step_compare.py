"""Comparison of this package's step with a plain loop: same model, images, augmentation and numerics, in turns.

The plain loop has a separate process, because this one has the package's own memory settings (see
allocator.keep_freed_memory). While one works, the other waits.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from ..config import Config
from ..distributed.launch import Launch, Runtime, set_numerics
from ..errors import ConfigError
from ..models import build_model
from ..phases import ENCODER
from ..seeding import stream
from ..training.build import describe_model
from ..training.data import load_data
from ..training.plan import peak_lr
from .plain_loop import POLICIES, PilImages, PlainLoop, TwoCrops, sample_transform
from .step_session import ROUNDS, WARM_UP, StepRow, StepSession, step_config

LARGEST_COMPARED = 64
"""Both are compared at the largest measured batch size up to this one, in images."""


@dataclass(frozen=True)
class Comparison:
    """Views/s of both in fp32: of the best and the worst round, and the ratio of the best ones.

    `compile`: whether this package's step was compiled, which it is where that was measured to be faster. The plain
    loop is not compiled.
    """

    encoder: str
    compile: bool
    batch_size: int
    steps: int
    ours: float
    ours_worst: float
    plain: float
    plain_worst: float
    ratio: float
    encoder_share: float


def check_comparable(config: Config) -> None:
    """Raise ConfigError where the plain loop cannot do the same as the step."""
    if config.augment.policy not in POLICIES or config.augment.blur or config.data.views != 2:
        raise ConfigError(
            f"the plain loop knows two views of {' and '.join(POLICIES)} without blur, not {config.data.views} of "
            f"{config.augment.policy}; use --no-plain"
        )
    if config.loss.weights != {"supcon_out": 1.0}:
        raise ConfigError(f"the plain loop minimizes supcon_out, not {config.loss.label}; use --no-plain")


def compare(
    encoder: str, results: Sequence[StepRow], overrides: Sequence[str], device: torch.device, seconds: float
) -> Comparison | None:
    """None where no batch size of `encoder` was measured."""
    rows = [r for r in results if r.encoder == encoder and r.seconds]
    if not rows:
        return None
    batch_size = max(
        (r.batch_size for r in rows if r.batch_size <= LARGEST_COMPARED), default=min(r.batch_size for r in rows)
    )
    compiled = max((r for r in rows if r.batch_size == batch_size), key=lambda r: r.views_per_s).compile
    config = step_config(encoder, "fp32", compiled, batch_size, overrides)
    with closing(StepSession(config, device)) as session:
        session.run(WARM_UP - 1)
        share = session.measure(1)
        steps = max(3, math.ceil(seconds / ROUNDS / share.total))
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        with plain_loop(config, steps, device) as pipe:
            for _ in range(ROUNDS):
                share = session.measure(steps)
                times["ours"].append(share.total * steps)
                pipe.send(None)
                times["plain"].append(pipe.recv())
    views = 2 * batch_size * steps
    best = {name: views / min(t) for name, t in times.items()}
    worst = {name: views / max(t) for name, t in times.items()}
    ratio = best["ours"] / best["plain"]
    print(
        f"{encoder}, batch {batch_size}, fp32{', compiled' * compiled}: {best['ours']:,.1f} views/s, "
        f"plain loop {best['plain']:,.1f}: {ratio:.2f}x (of each {ROUNDS} rounds of {steps} steps in turns, the best)"
    )
    return Comparison(
        encoder, compiled, batch_size, steps, best["ours"], worst["ours"], best["plain"], worst["plain"], ratio,
        share.share(ENCODER),
    )  # fmt: skip


@contextmanager
def plain_loop(config: Config, steps: int, device: torch.device) -> Iterator[Connection]:
    """A process with the plain loop, warmed up: send any object, and receive the seconds that `steps` steps took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, config, steps, device, torch.get_num_threads()))
    child.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
    finally:
        ours.close()
        child.join()


def _child(pipe: Connection, config: Config, steps: int, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    set_numerics(config.deterministic)
    loop = build_plain_loop(config, steps, device)
    loop.run()
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        loop.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pipe.send(time.perf_counter() - start)


def build_plain_loop(config: Config, steps: int, device: torch.device) -> PlainLoop:
    """The plain loop with the model, images, augmentation and learning rate of a StepSession of `config`."""
    splits = load_data(config, Runtime(Launch(), device)).splits
    description = describe_model(config, splits)
    norm, size = description["normalization"], description["encoder"]["image_size"]
    torch.manual_seed(stream(config.seed, "model"))
    model = build_model(description).to(device)
    transform = TwoCrops(sample_transform(size, norm["mean"], norm["std"], config.augment.policy))
    return PlainLoop(
        model.encoder, model.heads["projection"], PilImages(splits.train.stack(), splits.train.labels, transform),
        batch_size=config.data.batch_size, steps=steps, lr=peak_lr(config), device=device,
    )  # fmt: skip
