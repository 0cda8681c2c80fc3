"""Initial encoder weights: of timm, torchvision, SupContrast, solo-learn, MoCo, and of models that were pushed."""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsafeWeights
from .weight_files import WeightFile, read_weight_file

CONTAINERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts save the state dict."""
WRAPPERS = {"module", "encoder", "backbone", "encoder_q", "base_encoder", "model", "_orig_mod"}
"""Names of the encoder inside the models of other projects, in any nesting; `_orig_mod` is torch.compile's."""
MOMENTUM = re.compile(r"(^|\.)(encoder_k|queue\w*|momentum_\w+)(\.|$)")
"""The momentum encoder and the queue of MoCo and solo-learn."""
RENAMES = (
    (r"(^|\.)shortcut\.", r"\1downsample."),  # SupContrast
    (r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1"),  # torchvision's published DenseNet files
    (r"^classifier\.0\.", "pre_logits.fc1."),  # torchvision's VGG
    (r"^classifier\.3\.", "pre_logits.fc2."),
)


@dataclass(frozen=True)
class LoadedWeights:
    """Which tensors were loaded. `loaded` and `missing` are names in the encoder, the others names in the file."""

    path: str
    sha256: str
    loaded: list[str]
    missing: list[str]
    """In the encoder, not in the file: these may be the output layer and BatchNorm's batch counters."""
    unexpected: list[str]
    """In the file, not in the encoder: classifiers and projections."""
    ignored: list[str]
    """Momentum encoders and queues in the file."""
    commit: str | None = None
    """Of a model on the Hugging Face Hub."""

    def summary(self) -> str:
        commit = "" if self.commit is None else f"commit {self.commit}, "
        parts = [f"weights: {len(self.loaded)} tensors from {self.path} ({commit}sha256 {self.sha256[:12]})"]
        for what, names in (("not in the file", self.missing), ("not used", self.unexpected + self.ignored)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{what}: {', '.join(names[:5])}{more}")
        return "; ".join(parts)


def load_weights(encoder: nn.Module, where: Path | str) -> LoadedWeights:
    """Load the weights in `where` into an encoder of `build_encoder`. Where it raises, the encoder is unchanged.

    where: a file, a folder that `hpc-supcon push` wrote, or a model on the Hugging Face Hub (hf:NAME@REVISION), of
    which only model.safetensors is read. Files may be .safetensors files and files of `torch.save` (.pt, .pth, .ckpt,
    .pth.tar), the latter with `weights_only=True`: nothing in the file is executed. Every tensor of the encoder must
    be in the file in the same shape, except the output layer and BatchNorm's batch counters.

    Raises:
        UnsafeWeights: the file cannot be loaded without executing code.
        ConfigError: it cannot be read, or has weights of another architecture; the message names tensors.
        HubError, MissingExtra: a model on the Hub cannot be downloaded.
    """
    file = read_weight_file(where)
    path = file.name
    stored = _state_dict(_unpack(file), path)
    own = encoder.state_dict()
    names, surplus = _match(stored, own)
    optional = _optional(encoder, own)
    fitted = {name: _fit(stored[key], own[name]) for name, key in names.items()}
    wrong = {name for name, value in fitted.items() if value.shape != own[name].shape}
    required = [name for name in own if name not in names and name not in optional]
    if len(fitted) <= len(own) // 2 or surplus:
        raise _another_architecture(file, stored, own, surplus)
    if wrong - optional:
        raise _wrong_shapes(path, fitted, own, [name for name in own if name in wrong - optional])
    if required:
        raise ConfigError(f"model.weights={path}: {len(required)} tensors are missing: {', '.join(required)}")
    good = {name: fitted[name] for name in own if name in fitted and name not in wrong}
    encoder.load_state_dict(good, strict=False)
    used = {names[name] for name in good}
    left = [key for key in stored if key not in used]
    return LoadedWeights(
        path,
        hashlib.sha256(file.payload).hexdigest(),
        loaded=list(good),
        missing=[name for name in own if name not in good],
        unexpected=[key for key in left if not MOMENTUM.search(key)],
        ignored=[key for key in left if MOMENTUM.search(key)],
        commit=file.commit,
    )


def _unpack(file: WeightFile) -> Any:
    path, payload = file.name, file.payload
    if file.is_safetensors:
        try:
            return dict(
                sorted(safetensors.torch.load(payload).items())
            )  # sorted: its order changes from call to call
        except safetensors.SafetensorError as error:
            raise ConfigError(f"model.weights={path}: not a complete safetensors file: {error}") from None
    try:
        # SupContrast and timm save their options in a Namespace, which only has attributes
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles, which are refused below, and about old formats
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it contains {found[1]}" if found else "it is damaged, or not a file of tensors"
        raise UnsafeWeights(
            f"model.weights={path}: refused: {what}; loading a pickle of anything but tensors executes code. "
            "Somebody who trusts the file can load it and save its state dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        # what torch.load raises for damaged files
        raise ConfigError(
            f"model.weights={path}: damaged, or no file of weights: give a .safetensors file or one of torch.save"
        ) from None


def _state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """The tensors, taken out of the dictionaries that training scripts save them in. Raises ConfigError."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ConfigError(
            f"model.weights={path}: no state dict in it, neither at the top level nor under {', '.join(CONTAINERS)}"
        )
    return tensors


def _match(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """(encoder's name -> file's name, with the prefix that matches most tensors of the encoder; surplus names).

    Surplus names are those in the file that begin with a child module of the encoder but do not exist in it: the file
    is of a larger network (all tensors of a ResNet-18 exist in a ResNet-34).
    """
    best: dict[str, str] = {}
    surplus: list[str] = []
    children = {name.partition(".")[0] for name in own}
    for prefix in _prefixes(stored):
        found, more = dict[str, str](), list[str]()
        for key in stored:
            if key.startswith(prefix):
                name = key[len(prefix) :]
                name = name if name in own else _renamed(name)
                if name in own:
                    found[name] = key
                elif name.partition(".")[0] in children:
                    more.append(key)
        if len(found) > len(best):
            best, surplus = found, more
    return best, surplus


def _prefixes(stored: Mapping[str, Tensor]) -> list[str]:
    """Every sequence of WRAPPERS that keys begin with, including the empty one, shortest first."""
    prefixes = {""}
    for key in stored:
        parts = key.split(".")
        for n, part in enumerate(parts):
            if part not in WRAPPERS:
                break
            prefixes.add(".".join(parts[: n + 1]) + ".")
    return sorted(prefixes, key=lambda p: (len(p), p))


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fit(value: Tensor, own: Tensor) -> Tensor:
    """`value`, reshaped where the file has a linear layer and the encoder the equivalent convolution over the whole
    feature map (VGG of torchvision and of timm)."""
    same = value.ndim == 2 and own.ndim == 4 and value.shape[0] == own.shape[0] and value.numel() == own.numel()
    return value.reshape(own.shape) if same else value


def _optional(encoder: nn.Module, own: Mapping[str, Tensor]) -> set[str]:
    """Names of the encoder's tensors that a file may lack."""
    layers = tuple(f"{layer}." for layer in getattr(encoder, "output_layers", ()))
    return {name for name in own if name.startswith(layers) or name.endswith("num_batches_tracked")}


def _another_architecture(
    file: WeightFile, stored: Mapping[str, Tensor], own: Mapping[str, Tensor], surplus: list[str]
) -> ConfigError:
    def first(tensors: Mapping[str, Tensor]) -> str:
        return ", ".join(f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:3])

    what = f"model.weights={file.name}: weights of another architecture: "
    hint = f" Its config.json names {file.made_for}: see model.encoder" if file.made_for else ""
    if surplus:
        larger = f"{first({key: stored[key] for key in surplus})} ...{hint}"
        return ConfigError(f"{what}{len(surplus)} of the file's tensors do not exist in the encoder: {larger}")
    return ConfigError(f"{what}the file has {first(stored)} ...; the encoder has {first(own)} ...{hint}")


def _wrong_shapes(
    path: str, fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], wrong: list[str]
) -> ConfigError:
    shown = ", ".join(f"{name} is {list(fitted[name].shape)}, not {list(own[name].shape)}" for name in wrong[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    hint = ""
    value, target = fitted[wrong[0]], own[wrong[0]]
    if len(wrong) == 1 and value.ndim == target.ndim == 4:
        if value.shape[-1] != target.shape[-1]:
            hint = f"; the file has the other stem: set model.stem={'standard' if value.shape[-1] == 7 else 'small'}"
        elif value.shape[1] != target.shape[1]:
            hint = f"; the file is for images of {value.shape[1]} channels: set data.channels={value.shape[1]}"
            if target.shape[1] not in (1, 3):  # which are converted to no other number
                hint = f"; the file is for images of {value.shape[1]} channels, not {target.shape[1]}: use null"
    return ConfigError(f"model.weights={path}: shapes differ: {shown}{more}{hint}")
