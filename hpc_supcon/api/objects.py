"""Objects of Python in place of what a configuration names: they are frozen with a run by name and sha256, and a run
folder alone cannot build them again."""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import parts
from ..config import Config
from ..config.code import paths_in
from ..data.sources.datasets import Datasets
from ..errors import ConfigError
from ..known_names import given as known
from ..parts import Kind, Part, version_of
from .settings import overrides_of

SourceObject = Datasets
EncoderObject = nn.Module | Callable[..., nn.Module]
LossObject = nn.Module | Callable[[Tensor, Tensor], Tensor] | type[nn.Module]
SAMPLE = 8
"""Items of a dataset whose pixels are part of its name."""
SETTINGS: dict[Kind, str] = {"sources": "data.source", "encoders": "model.encoder", "losses": "loss.name"}
CLEARED: dict[Kind, dict[str, Any]] = {
    "sources": {"data.options": None, "data.beton": None, "data.train_images": None},
    "encoders": {"model.options": None, "model.weights": None, "model.stem": "auto"},
    "losses": {"loss.options": None, "loss.terms": None},
}
"""Settings of what an object takes the place of."""


class FunctionLoss(nn.Module):
    """A loss that is a function of (embeddings, labels)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.function(embeddings, labels)


@dataclass(frozen=True)
class Objects:
    """What a user gives in place of data.source, model.encoder and loss.name; None: what the settings name."""

    source: SourceObject | None = None
    encoder: EncoderObject | None = None
    loss: LossObject | None = None
    names: Mapping[Kind, str] | None = None
    """The names by which a run folder has them, where they were given before."""
    named: Sequence[str] = ()
    """All import paths in the run folder."""

    def parts(self) -> Iterator[Part]:
        """Each object as the part of its name. Raises ConfigError for what cannot be one."""
        given = {"sources": self.source, "encoders": self.encoder, "losses": self.loss}
        calls = {"sources": _source_call, "encoders": _encoder_call, "losses": _loss_call}
        for kind in SETTINGS:
            if (found := given[kind]) is not None:
                of = _class_of(found)
                own = f"{_name_of(of)}.{_digest(found)}" if kind == "sources" else _name_of(of)
                name = (self.names or {}).get(kind) or own
                yield _part(kind, name, calls[kind](found), of)

    def overrides(self) -> list[str]:
        """The settings that name the objects."""
        settings: dict[str, Any] = {}
        for part in self.parts():
            settings |= {SETTINGS[part.kind]: part.name} | CLEARED[part.kind]
        return overrides_of(settings)

    def of_run(self, folder: Path, config: Config) -> Objects:
        """The same, by the names that the run in `folder` has for them. Raises ConfigError for an object where the
        run was trained without one."""
        of: dict[Kind, list[str]] = {
            "sources": [config.data.source], "encoders": [config.model.encoder], "losses": list(config.loss.weights),
        }  # fmt: skip
        names = {kind: next(filter(parts.is_path, found), "") for kind, found in of.items()}
        for part in self.parts():
            if not names[part.kind]:
                raise ConfigError(
                    f"{part.kind.rstrip('s')}={part.name}: {folder} was trained with "
                    f"{SETTINGS[part.kind]}={', '.join(of[part.kind])}, which needs no object: leave it out"
                )
        return replace(self, names=names, named=named_in(folder))


def named_in(folder: Path) -> list[str]:
    """All import paths in a run folder."""
    return [name for names in paths_in(folder).values() for name in names]


@contextmanager
def given(objects: Objects) -> Iterator[None]:
    """Inside, the names of the objects stand for them."""
    with known({(part.kind, part.name): part for part in objects.parts()}, objects.named):
        yield


def _part(kind: Kind, name: str, call: Callable[..., Any], of: object) -> Part:
    """The part `name` that `call` makes. of: the object, or its class, whose module is recorded; of a script or a
    notebook, which has much else in it, the sha256 is that of the text of the class or function alone."""
    module = getattr(of, "__module__", None) or type(of).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        is_alone = file is None or module == "__main__"
        text = inspect.getsource(of).encode() if is_alone else Path(file).read_bytes()  # type: ignore[arg-type]
    except (OSError, TypeError):  # built in, or typed into an interpreter
        text = None
    digest = None if text is None else hashlib.sha256(text).hexdigest()
    return Part(kind, name, call, module, version_of(module), file, digest)


def _class_of(found: Any) -> Any:
    """What has a name: the class of an object, a class or function itself, of several datasets that of train."""
    if isinstance(found, Mapping):
        return _class_of(found.get("train"))
    if isinstance(found, tuple) and found:
        return _class_of(found[0])
    is_named = isinstance(found, type) or inspect.isroutine(found)
    return found if is_named else type(found)


def _name_of(of: Any) -> str:
    """module:qualname, as far as it may stand in a configuration."""
    name = getattr(of, "__qualname__", type(of).__qualname__).replace("<", "").replace(">", "")
    return f"{getattr(of, '__module__', None) or type(of).__module__}:{name}"


def _digest(datasets: Any) -> str:
    """What tells images from others of the same class, as a part of a name: a digest of their numbers and of some of
    them. What cannot be read is told later."""
    found = hashlib.sha256()
    splits = tuple(datasets.values()) if isinstance(datasets, Mapping) else datasets
    for dataset in splits if isinstance(splits, tuple) else (splits,):
        with suppress(Exception):
            n = len(dataset)
            found.update(f"{n};".encode())
            for i in sorted({k * n // SAMPLE for k in range(SAMPLE)}):
                item = dataset[i]
                for part in item if isinstance(item, tuple | list) else (item,):
                    found.update(np.asarray(part).tobytes())
    return f"d{found.hexdigest()[:8]}"


def _source_call(datasets: Any) -> Callable[..., Any]:
    def call(root: Any = None) -> Any:
        return datasets

    return call


def _encoder_call(found: Any) -> Callable[..., Any]:
    if isinstance(found, nn.Module):
        return lambda in_channels, image_size, out_dim: copy.deepcopy(found)
    if not callable(found):
        raise ConfigError(f"encoder= is of type {type(found).__name__}, not a torch.nn.Module or what makes one")
    taken = _taken(found, ("in_channels", "image_size", "out_dim"))

    def call(in_channels: int, image_size: int, out_dim: int | None) -> Any:
        values = {"in_channels": in_channels, "image_size": image_size, "out_dim": out_dim}
        return found(**{name: values[name] for name in taken})

    return call


def _loss_call(found: Any) -> Callable[..., Any]:
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    if not callable(found) or isinstance(found, type):
        raise ConfigError(f"loss= is of type {type(found).__name__}, not a torch.nn.Module or a function")
    return lambda: FunctionLoss(found)


def _taken(function: Callable[..., Any], names: Sequence[str]) -> list[str]:
    """Those of the names that a function takes as keyword arguments; all where its signature is not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return list(names)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return list(names)
    return [name for name in names if any(p.name == name and p.kind is not p.POSITIONAL_ONLY for p in parameters)]
