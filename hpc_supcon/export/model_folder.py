"""The files of a model that is given away: what timm, transformers and this package load it from.

model.safetensors                the encoder (adapters are merged, averaged weights taken)
config.json                      timm's description of it, where timm can build it, and that of this package
projection.safetensors           the projection, where there is one
probe-KIND.safetensors           fitted probes of this encoder
README.md, report.html           the model card and the page
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from .. import __version__, checkpoint
from ..errors import ConfigError, first_line
from ..evaluation.encoder import load_model
from ..evaluation.fitted_probe import FOLDER, build_probe, load_probe
from ..evaluation.probes import PROBES, FittedProbe
from ..models import Projection, build_encoder
from ..models.weight_files import CONFIG, OWN_KEY, WEIGHTS, read_beside, read_model_config, read_weight_file
from .parts import ModelPart, as_classifier, model_part, with_projection

VERSION = 1
"""Of the description under OWN_KEY in config.json."""
PROJECTION = "projection.safetensors"
TOLERANCE = 1e-5
"""Largest allowed difference of the features of timm's model, relative to the largest feature if that is above 1."""
LEFT_OUT = ("knn",)
"""Probes that stay at home: the weights of the k nearest neighbors are the training images' features."""


@dataclass(frozen=True)
class Written:
    """What `write_model` has put into a folder."""

    part: ModelPart
    """The encoder."""
    has_projection: bool
    probes: tuple[str, ...]
    not_timm: str | None
    """Why timm and transformers cannot build the encoder; None where they can."""


def write_model(run: Path, folder: Path, *, name: str) -> Written:
    """Write the encoder of a run's best checkpoint, its projection and its probes into an empty folder.

    name: of the model, for people. config.json is for timm where timm then loads the folder and gives the same
    features. Raises RunFolderError, CheckpointCorrupt, OSError.
    """
    model, found = load_model(run)
    state = found.state
    encoder = state["encoder"]
    part = model_part(
        "encoder",
        model.encoder,
        checkpoint=found.name,
        classes=state["classes"],
        normalization=state["normalization"],
        encoder=encoder,
    )
    _save(folder / WEIGHTS, part.module, {"format": "pt"})
    has_projection = "projection" in model.heads
    if has_projection:
        _save(folder / PROJECTION, model.heads["projection"], {"description": json.dumps(state["projection"])})
    probes = []
    for kind, probe in _probes(run, state["step"]):
        _save(folder / f"probe-{kind}.safetensors", probe, {"description": json.dumps(probe.description)})
        probes.append(kind)
    own = {
        "format": VERSION,
        "version": __version__,
        "name": name,
        "projection": state["projection"] if has_projection else None,
        "probes": probes,
        **{key: part.description[key] for key in ("checkpoint", "encoder", "normalization", "classes")},
    }
    reason = _write_config(folder, part, own)
    return Written(part, has_projection, tuple(probes), reason)


def _save(path: Path, module: nn.Module, metadata: Mapping[str, str]) -> None:
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in module.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata=dict(metadata)))


def _probes(run: Path, step: int) -> Iterator[tuple[str, FittedProbe]]:
    """The run's probes of this encoder (a fine-tuned one has an encoder of its own)."""
    for kind in PROBES:
        if kind in LEFT_OUT or not checkpoint.list_steps(run / FOLDER / kind):
            continue
        probe = load_probe(run / FOLDER / kind)
        if probe.input != "pixels" and probe.description["step"] == step:
            yield kind, probe


def _write_config(folder: Path, part: ModelPart, own: dict[str, Any]) -> str | None:
    """Write config.json: for timm where that works; else the reason why not."""
    reason = _not_timm(part)
    if reason is None:
        _write_json(folder / CONFIG, timm_config(part) | {OWN_KEY: own})
        reason = _differs(folder, part)
    if reason is not None:
        # names that neither timm nor transformers has: both then say so, and build nothing else
        of_no_other = {"architecture": f"hpc_supcon-{own['encoder']['name']}", "model_type": "hpc_supcon"}
        _write_json(folder / CONFIG, of_no_other | {OWN_KEY: own})
    return reason


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _not_timm(part: ModelPart) -> str | None:
    encoder = part.description["encoder"]
    if encoder["name"] not in timm.list_models():
        return f"{encoder['name']} is an encoder of hpc_supcon"
    if part.module.stem_kind == "small":
        return f"timm's {encoder['name']} has no small stem (3x3 of stride 1, no max-pool)"
    if encoder.get("channels"):
        return f"this {encoder['name']} has fewer channels than timm's"
    return None


def timm_config(part: ModelPart) -> dict[str, Any]:
    """config.json as timm's hub loading reads it: the model's arguments, and how images are prepared."""
    encoder, normalization = part.description["encoder"], part.description["normalization"]
    size = encoder["input_size"] or encoder["image_size"]
    known: Any = timm.get_pretrained_cfg(encoder["name"])
    fixed = known is not None and bool(known.fixed_input_size)
    module: Any = part.module
    classes = encoder["out_dim"] or 0
    arguments: dict[str, Any] = {"img_size": size} if fixed else {}
    if encoder["in_channels"] != 3:
        arguments["in_chans"] = encoder["in_channels"]
    return {
        "architecture": encoder["name"],
        "num_classes": classes,
        "num_features": module.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [encoder["in_channels"], size, size],
            "fixed_input_size": fixed,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(normalization["mean"]),
            "std": list(normalization["std"]),
            "num_classes": classes,
            # no first_conv: older versions of timm would take weights of 3 input channels for granted
            "classifier": module.pretrained_cfg.get("classifier"),
        },
    }


@torch.no_grad()
def _differs(folder: Path, part: ModelPart) -> str | None:
    """Why the model that timm loads from `folder` is another one; None: its features are those of `part`."""
    size = part.description["encoder"]["input_size"] or part.shape[1]
    images = torch.randn(2, part.shape[0], size, size, generator=torch.Generator().manual_seed(0))
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        actual: Tensor = loaded(images)
    except Exception as error:  # timm's models raise many types
        return f"timm cannot load it: {first_line(error)}"
    expected: Tensor = part.module(images)
    largest = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    if largest <= TOLERANCE * max(1.0, float(expected.abs().max())):
        return None
    return f"the features of timm's {part.description['encoder']['name']} differ by {largest:.1g}"


def load_pushed(where: str | Path, part: str = "encoder", probe: str | None = None) -> ModelPart:
    """The model in a folder that `hpc-supcon push` wrote, or in one on the Hugging Face Hub, "hf:NAME@REVISION".

    part: encoder (features [N, D]), projection (embeddings of unit length), or classifier: the encoder with the
    fitted `probe`, such as "linear" (logits). The part takes uint8 images [N, C, S, S].

    Raises ConfigError for what is not there, HubError, MissingExtra. Nothing that is read is executed.
    """
    text = str(where)
    file = read_weight_file(text)
    own = read_model_config(text, commit=file.commit).get(OWN_KEY)
    try:
        if not isinstance(own, dict) or own["format"] != VERSION:
            raise ConfigError(f"{text}: its config.json is not of `hpc-supcon push`; see model.weights")
        encoder = build_encoder(**own["encoder"])
        encoder.load_state_dict(safetensors.torch.load(file.payload))
        module, facts = _module(text, file.commit, own, encoder, part, probe)
        return model_part(
            part,
            module,
            checkpoint=own["checkpoint"],
            normalization=own["normalization"],
            encoder=own["encoder"],
            **({"classes": own["classes"]} | facts),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{text}: damaged, or written by another version: {first_line(error)}") from None


def _module(
    where: str, commit: str | None, own: dict[str, Any], encoder: Any, part: str, probe: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """(the module of a part, what its description says beside that of the encoder)."""
    if part == "encoder":
        return encoder, {}
    if part == "projection":
        if own["projection"] is None:
            raise ConfigError(f"{where}: has no projection")
        projection = Projection(encoder.feature_dim, **own["projection"])
        projection.load_state_dict(safetensors.torch.load(read_beside(where, PROJECTION, commit=commit)))
        return with_projection(encoder, projection), {"projection": own["projection"]}
    if part != "classifier" or probe not in own["probes"]:
        choices = ", ".join(["encoder", "projection", *(f"classifier with probe={kind!r}" for kind in own["probes"])])
        raise ConfigError(f"{where}: no part {part!r} with probe={probe!r} in it; it has: {choices}")
    payload = read_beside(where, f"probe-{probe}.safetensors", commit=commit)
    description = json.loads(_metadata(payload)["description"])
    fitted = build_probe(description)
    fitted.load_state_dict(safetensors.torch.load(payload))
    return as_classifier(encoder, fitted), {"classes": description["classes"], "probe": description}


def _metadata(payload: bytes) -> dict[str, str]:
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
    assert isinstance(metadata, dict)
    return metadata
