"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): less memory for one more forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError


@contextmanager
def frozen_running_statistics(*modules: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalizes by the statistics of its batch, but its running statistics do not change.

    It updates copies instead. (Without running statistics, BatchNorm would save fewer tensors for its backward pass
    than in the first forward pass, and torch.utils.checkpoint requires the same ones.)
    """
    norms = {id(m): m for module in modules for m in module.modules() if _is_batch_norm(m)}
    originals = [(norm, dict(norm._buffers)) for norm in norms.values()]
    for norm, buffers in originals:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in originals:
            norm._buffers.update(buffers)


def apply_activation_checkpointing(encoder: nn.Module) -> int:
    """Change `encoder` so that it saves only the inputs of its blocks and recomputes the rest in the backward pass.

    Outputs, gradients, buffers, names and random draws stay the same. Blocks are the repeated modules of the
    architecture, such as those of a ResNet's stages. A plain sequence of layers, such as VGG's, has none: it is cut
    into segments, about as many as the square root of its number of layers. Returns the number of blocks and
    segments; raises ConfigError for an encoder without either.
    """
    number = 0
    for module in _find_blocks(encoder):
        number += _checkpoint_segments(module) if _is_layer_sequence(module) else _checkpoint_block(module)
    if not number:
        raise ConfigError(
            f"train.activation_checkpointing: {type(encoder).__name__} has no repeated blocks; use false"
        )
    return number


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost repeated blocks inside `module`, and its sequences of layers."""
    for child in module.children():
        if _is_layer_sequence(child):
            yield child
        elif isinstance(child, nn.Sequential | nn.ModuleList) and _is_stage(child):
            for block in _non_leaf_children(child):
                inner = list(_find_blocks(block))
                if inner and not _is_layer_sequence(inner[0]):
                    yield from inner
                else:
                    yield block
        else:
            found = _find_blocks(child)
            yield from (b for b in found if not _is_layer_sequence(b) or isinstance(child, nn.Sequential))


def _is_stage(container: nn.Sequential | nn.ModuleList) -> bool:
    """Whether it holds blocks, one after the other; in small models of a family a stage may be a single block."""
    blocks = len(_non_leaf_children(container))
    return blocks > 1 or (len(container) == 1 and blocks == 1)


def _non_leaf_children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if not _is_leaf(child)]


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _is_layer_sequence(module: nn.Module) -> bool:
    """Whether it is a Sequential with at least three convolutions or linear layers as its direct children."""
    return isinstance(module, nn.Sequential) and sum(_is_weight_layer(layer) for layer in module) > 2


def _is_weight_layer(layer: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return _is_leaf(layer) and any(p.ndim > 1 for p in layer.parameters())


def _checkpoint_block(block: nn.Module) -> int:
    block.forward = partial(_checkpointed, block.forward, (block,))
    return 1


def _checkpoint_segments(sequence: nn.Module) -> int:
    """Run a sequence of layers in segments. Returns their number."""
    layers = list(sequence.children())
    # A segment never begins with a layer that may work in place (ReLU), because its input is needed again.
    starts = [i for i, layer in enumerate(layers) if i == 0 or _is_weight_layer(layer) or not _is_leaf(layer)]
    starts = starts[:: math.isqrt(len(starts))]
    segments = [tuple(layers[a:b]) for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
    forwards = [partial(_checkpointed, partial(_run_layers, segment), segment) for segment in segments]
    sequence.forward = partial(_run_segments, forwards)
    return len(segments)


def _run_segments(segments: Sequence[Callable[[Any], Any]], x: Any) -> Any:
    for segment in segments:
        x = segment(x)
    return x


def _run_layers(layers: tuple[nn.Module, ...], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _checkpointed(forward: Callable[..., Any], modules: tuple[nn.Module, ...], *args: Any, **kwargs: Any) -> Any:
    """`forward(...)`, of which the backward pass recomputes what `modules` would save."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        # Of the forward pass and of the recomputation: only the first may update running statistics.
        return nullcontext(), frozen_running_statistics(*modules)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
