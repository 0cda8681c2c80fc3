"""Activation checkpointing (Chen et al. 2016): keep the inputs of an encoder's blocks, compute the rest again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError


@contextmanager
def untouched_statistics(*modules: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalizes by its batch as in training, but its running statistics stay as they are.

    They move in copies: without them BatchNorm would save fewer tensors for its backward pass than before.
    """
    norms = {id(m): m for module in modules for m in module.modules() if _is_batch_norm(m)}
    own = [(norm, dict(norm._buffers)) for norm in norms.values()]
    for norm, buffers in own:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in own:
            norm._buffers.update(buffers)


def recompute_activations(encoder: nn.Module) -> int:
    """Let `encoder` keep only the inputs of its blocks for the backward pass; returns the number of blocks.

    Outputs, gradients, buffers, names and random draws are those of the plain form. The blocks are the repeated
    ones of the architecture; a plain chain of layers is cut into about the square root of its length.
    Raises ConfigError for an encoder without either.
    """
    number = 0
    for block in _blocks(encoder):
        number += _cut(block) if _is_chain(block) else _wrap(block)
    if not number:
        raise ConfigError(
            f"train.activation_checkpointing: {type(encoder).__name__} has no repeated blocks; use false"
        )
    return number


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost repeated blocks below `module`, and chains of layers."""
    for child in module.children():
        if _is_chain(child):
            yield child
        elif isinstance(child, nn.Sequential | nn.ModuleList) and _repeats(child):
            for part in _composite(child):
                inner = list(_blocks(part))
                if inner and not _is_chain(inner[0]):
                    yield from inner
                else:
                    yield part
        else:
            yield from (b for b in _blocks(child) if not _is_chain(b) or isinstance(child, nn.Sequential))


def _repeats(container: nn.Sequential | nn.ModuleList) -> bool:
    """Blocks one after the other; also the stage of one block that a small model of a family has."""
    return len(_composite(container)) > 1 or (len(container) == 1 and len(_composite(container)) == 1)


def _composite(container: nn.Module) -> list[nn.Module]:
    return [c for c in container.children() if any(True for _ in c.children())]


def _is_chain(module: nn.Module) -> bool:
    """A Sequential of layers with three or more that hold weights, not of blocks."""
    if not isinstance(module, nn.Sequential):
        return False
    return sum(_holds_weights(layer) for layer in module) > 2


def _holds_weights(layer: nn.Module) -> bool:
    """A convolution or a linear layer by itself."""
    return not any(True for _ in layer.children()) and any(p.ndim > 1 for p in layer.parameters())


def _wrap(block: nn.Module) -> int:
    block.forward = partial(_recomputed, block.forward, (block,))
    return 1


def _cut(chain: nn.Module) -> int:
    """Run a chain in pieces, each from one layer with weights to another."""
    layers = list(chain.children())
    # no piece begins with a layer that may work in place: its input must outlive it
    starts = [i for i, layer in enumerate(layers) if i == 0 or _holds_weights(layer) or _composite_block(layer)]
    starts = starts[:: math.isqrt(len(starts))]
    pieces = [tuple(layers[a:b]) for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
    chain.forward = partial(_in_pieces, [partial(_recomputed, partial(_through, piece), piece) for piece in pieces])
    return len(pieces)


def _composite_block(layer: nn.Module) -> bool:
    return any(True for _ in layer.children())


def _in_pieces(pieces: list[Callable[[Any], Any]], x: Any) -> Any:
    for piece in pieces:
        x = piece(x)
    return x


def _through(layers: tuple[nn.Module, ...], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _recomputed(forward: Callable[..., Any], modules: tuple[nn.Module, ...], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), untouched_statistics(*modules)  # which the first pass has moved already

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
