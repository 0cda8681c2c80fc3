"""Training a part of a model: which parameters and which BatchNorm statistics stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, unknown_name

HEADS = "head"
"""Stands for all heads."""


def train_only(model: nn.Module, names: Sequence[str], *, setting: str = "model.train") -> None:
    """Freeze all of `model` but the modules called `names`: no gradients for its parameters, and BatchNorm in eval
    mode, whose statistics stay as they are, whatever `model.train()` is told later (see `keep_in_eval`).

    model: a PretrainingModel. names: of modules or parameters of the encoder ("layer4", "cls_token"), of heads
    ("projection"), or "head" for all heads. A name stands for all that is in the module: "blocks.1" for
    "blocks.1.attn", not for "blocks.10".

    Raises ConfigError for a name that does not exist, and where nothing is left to train.
    """
    known = _known(model)
    prefixes = []
    for name in names:
        found = [path for path in (name, f"encoder.{name}", f"heads.{name}") if path in known]
        found += ["heads"] if name == HEADS else []
        if not found:
            raise ConfigError(
                f"{setting}: " + unknown_name("module", name, _alike(known, name), listed=_listed(model))
            )
        prefixes += found

    def is_trained(path: str) -> bool:
        return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)

    for path, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(path))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"{setting}=[{', '.join(names)}]: these modules have no weights, so nothing would be trained"
        )
    keep_in_eval(model, is_trained)


def keep_in_eval(model: nn.Module, is_trained: Callable[[str], bool]) -> None:
    """Keep the BatchNorm layers of a PretrainingModel in eval mode of which `is_trained`, of a name, is False."""
    paths = [path for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    model.frozen_norms = tuple(path for path in paths if not is_trained(path))  # type: ignore[assignment]
    model.train(model.training)


def _known(model: nn.Module) -> set[str]:
    """The names of all modules and parameters."""
    return {path for path, _ in model.named_modules() if path} | {path for path, _ in model.named_parameters()}


def _alike(known: set[str], name: str) -> set[str]:
    """Names as users write them, without that of the part that they are in, which are no longer than `name`."""
    short = {path.partition(".")[2] for path in known} - {""} | {HEADS}
    return {path for path in short if path.count(".") <= name.count(".")}


def _listed(model: nn.Module) -> str:
    children = [child for part in model.children() for child in part.named_children()]
    parts = [name for name, child in children if any(True for _ in child.parameters())]
    return f"{', '.join([*parts, HEADS])}, and what is in them"
