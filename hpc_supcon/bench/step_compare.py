"""The step of this package beside a plain loop: same model, images, augmentation and precision, in turns."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from ..config import Config
from ..errors import ConfigError
from ..phases import ENCODER
from ..training.assemble import peak_lr
from .plain_loop import POLICIES, PilImages, PlainLoop, TwoCrops, sample_transform
from .step import ROUNDS, WARM_UP, Result, Session, settings

AFFORDABLE = 64
"""Images of the batch that both are compared at, or the largest measured below that."""


@dataclass(frozen=True)
class Comparison:
    """Views/s of both over the same rounds, fp32: the best and the worst round, and the ratio of the best ones."""

    encoder: str
    batch_size: int
    steps: int
    ours: float
    ours_worst: float
    plain: float
    plain_worst: float
    ratio: float
    encoder_share: float


def check_comparable(config: Config) -> None:
    """Raise ConfigError where the plain loop has no form of what is measured."""
    if config.augment.policy not in POLICIES or config.augment.blur or config.data.views != 2:
        raise ConfigError(
            f"the plain loop knows two views of {' and '.join(POLICIES)} without blur, not {config.data.views} of "
            f"{config.augment.policy}; use --no-plain"
        )
    if config.loss.weights != {"supcon_out": 1.0}:
        raise ConfigError(f"the plain loop minimises supcon_out, not {config.loss.label}; use --no-plain")


def compare(
    encoder: str, results: Sequence[Result], overrides: Sequence[str], device: torch.device, seconds: float
) -> Comparison | None:
    """At the batch size that AFFORDABLE names; None where none was measured."""
    sizes = [r.batch_size for r in results if r.encoder == encoder and r.seconds]
    if not sizes:
        return None
    batch_size = max((n for n in sizes if n <= AFFORDABLE), default=min(sizes))
    config = settings(encoder, "fp32", False, batch_size, overrides)
    with closing(Session(config, device)) as session:
        session.run(WARM_UP - 1)
        share = session.measure(1)
        steps = max(3, math.ceil(seconds / ROUNDS / share.total))
        plain = _plain_loop(session, config, batch_size, steps, device)
        plain.run()
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(ROUNDS):
            share = session.measure(steps)
            times["ours"].append(share.total * steps)
            times["plain"].append(_timed(plain.run, device))
    views = 2 * batch_size * steps
    best = {name: views / min(t) for name, t in times.items()}
    worst = {name: views / max(t) for name, t in times.items()}
    ratio = best["ours"] / best["plain"]
    print(
        f"{encoder}, batch {batch_size}, fp32: {best['ours']:,.1f} views/s, plain loop {best['plain']:,.1f}: "
        f"{ratio:.2f}x (of each {ROUNDS} rounds of {steps} steps in turns, the best)"
    )
    return Comparison(
        encoder, batch_size, steps, best["ours"], worst["ours"], best["plain"], worst["plain"], ratio,
        share.share(ENCODER),
    )  # fmt: skip


def _plain_loop(session: Session, config: Config, batch_size: int, steps: int, device: torch.device) -> PlainLoop:
    train, norm = session.data.splits.train, session.description["normalisation"]
    model = copy.deepcopy(session.state.model).to(memory_format=torch.contiguous_format)
    size = session.description["encoder"]["image_size"]
    transform = TwoCrops(sample_transform(size, norm["mean"], norm["std"], config.augment.policy))
    data = PilImages(train.stack(), train.labels, transform)
    head = model.heads["projection"]
    return PlainLoop(model.encoder, head, data, batch_size=batch_size, steps=steps, lr=peak_lr(config), device=device)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
