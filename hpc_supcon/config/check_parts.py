"""Parts of a user's own: imported, and checked against their signatures, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from .. import parts
from ..errors import ConfigError
from .encoders import is_own_encoder
from .schema import Config, names

Used = tuple[parts.Kind, str, Mapping[str, Any] | None]
"""Kind, name and options of a part."""


def own_parts(config: Config, stages: Sequence[str] = ("pretrain", "probe", "prune")) -> Iterator[Used]:
    """The parts that are not of this package, of those that `stages` use. Raises PartError."""
    if parts.is_own("sources", config.data.source, get_args(names.SourceName)):
        yield "sources", config.data.source, config.data.options
    if is_own_encoder(config.model.encoder):
        yield "encoders", config.model.encoder, config.model.options
    if parts.is_own("policies", config.augment.policy, get_args(names.PolicyName)):
        yield "policies", config.augment.policy, config.augment.options
    if "pretrain" in stages or "prune" in stages:
        for name in config.loss.weights:
            if parts.is_own("losses", name, get_args(names.LossName)):
                yield "losses", name, config.loss.options_of(name)
    if "probe" in stages or "prune" in stages:
        for kind in config.probe.kinds:
            if parts.is_own("probes", kind, get_args(names.ProbeName)):
                yield "probes", kind, config.probe.options_of(kind)
    for name in config.log.loggers:
        if parts.is_own("loggers", name, get_args(names.LoggerName)):
            yield "loggers", name, None


def check_parts(config: Config, stages: Sequence[str]) -> None:
    """Raise PartError for a part that cannot be imported or takes other arguments, ConfigError for options of a part
    that is none of the user's own. Imports the modules of the parts, and says so."""
    options = {
        "data.options": (config.data.options, "data.source", config.data.source),
        "model.options": (config.model.options, "model.encoder", config.model.encoder),
        "augment.options": (config.augment.options, "augment.policy", config.augment.policy),
        "loss.options": (config.loss.options, "loss.name", ", ".join(config.loss.weights)),
        "probe.options": (config.probe.options, "probe.kind", ", ".join(config.probe.kinds)),
    }
    used = list(own_parts(config))
    own_kinds = {kind for kind, _, _ in used}
    kinds: tuple[parts.Kind, ...] = ("sources", "encoders", "policies", "losses", "probes")
    for kind, (setting, (value, of, name)) in zip(kinds, options.items(), strict=True):
        if value and kind not in own_kinds:
            raise ConfigError(
                f"{setting} is for a part of your own, but {of}={name} is one of hpc_supcon, which has settings of "
                f"its own: use {setting}=null"
            )
    for kind, name, given in own_parts(config, stages):
        part = parts.find(kind, name)
        assert part is not None
        part.check_options(given or {}, dict(zip(kinds, options, strict=True)).get(kind, parts.ONE[kind]))


def records(
    config: Config, stages: Sequence[str] = ("pretrain",), *, kinds: Sequence[parts.Kind] = parts.KINDS
) -> dict[str, dict[str, str | None]]:
    """`KIND NAME` -> module, version, file and its sha256 of each part that `stages` use, of these kinds.

    Loggers are left out: they change no results.
    """
    found: dict[str, dict[str, str | None]] = {}
    for kind, name, _ in own_parts(config, stages):
        if kind in kinds and kind != "loggers":
            part = parts.find(kind, name)
            assert part is not None
            found[f"{kind} {name}"] = part.record()
    return found
