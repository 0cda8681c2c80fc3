"""File formats by name: how a model part is written to bytes, and how a file is read as a function of pixels."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..data import dtype_of, full_scale
from ..errors import ExportError
from ..renamed import new_state
from .parts import ModelPart, PixelModel, build_part

METADATA = "metadata.json"
"""Name of the metadata inside .pt and .pt2 files; ONNX and safetensors have a place for metadata."""
PROTOBUF_LIMIT = 2**31
"""Bytes; an ONNX file must be smaller."""
GRAPH_BYTES = 1 << 20
"""Upper bound of what an ONNX file holds besides its weights."""

Metadata = Mapping[str, str]
PixelFunction = Callable[[Tensor], Tensor]
"""float32 [N, C, S, S] in 0..1 -> the part's output."""


@dataclass(frozen=True)
class FileFormat:
    suffix: str
    input: str
    """The values that the model in the file expects; {full} is the highest level of a pixel."""
    to_bytes: Callable[[ModelPart, Metadata], bytes]
    read: Callable[[Path], PixelFunction]
    needs: tuple[str, ...] = ()
    """Optional packages, by import name."""


def metadata_of(part: ModelPart, format: str) -> dict[str, str]:
    """The metadata written into the file: text by name. Lists and dictionaries are JSON."""
    from .. import __version__

    description = part.description
    channels, size, _ = part.shape
    kind = {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels")
    scaled = FORMATS[format].input.format(full=full_scale(dtype_of(part.bits)))
    metadata = {
        "made_by": f"hpc-supcon {__version__}",
        "format": format,
        "part": part.name,
        "checkpoint": description["checkpoint"],
        "input": f"float32 [N, {channels}, {size}, {size}], {kind}, {scaled}",
        "resize": f"shorter side to {size} px (bilinear, antialiased), then the central square",
        "output": f"{part.output}, float32 [N, D]",
        "normalization": json.dumps(description["normalization"]),
        "classes": json.dumps(description["classes"]),
        "description": json.dumps(description),
    }
    return metadata | (_rebuild_expressions(part) if part.name == "encoder" else {})


def _rebuild_expressions(part: ModelPart) -> dict[str, str]:
    """Python expressions that build a module for the file's state dict: by this package and, if it fits, by timm."""
    encoder = part.description["encoder"]
    options = ", ".join(f"{key}={value!r}" for key, value in encoder.items() if key != "name" and value is not None)
    name, stem = encoder["name"], part.module.stem_kind
    expressions = {"rebuild": f"hpc_supcon.models.build_encoder({name!r}, {options})"}
    if name in timm.list_models() and stem != "small" and not encoder.get("channels"):
        cfg = timm.get_pretrained_cfg(name)
        fixed_size = cfg is not None and cfg.fixed_input_size
        size = f", img_size={encoder['input_size'] or encoder['image_size']}" if fixed_size else ""
        classes = encoder["out_dim"] or 0
        expressions["timm"] = (
            f"timm.create_model({name!r}, num_classes={classes}, in_chans={encoder['in_channels']}{size})"
        )
    return expressions


def _safetensors_bytes(part: ModelPart, metadata: Metadata) -> bytes:
    tensors = {name: t.detach().clone().contiguous() for name, t in part.module.state_dict().items()}
    return safetensors.torch.save(tensors, metadata=dict(metadata))


def _read_safetensors(path: Path) -> PixelFunction:
    with safe_open(path, framework="pt") as file:
        description = new_state(json.loads(file.metadata()["description"]))
    module = build_part(description)
    module.load_state_dict(safetensors.torch.load_file(path))
    return PixelModel(ModelPart(module, description)).eval()


@contextmanager
def _no_torchscript_warnings() -> Iterator[None]:
    """Silences PyTorch's warnings that TorchScript is deprecated, as the user asked for this format, and that shapes
    became constants, as the file is compared with the model at other batch sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=category)
        yield


def _torchscript_bytes(part: ModelPart, metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    with _no_torchscript_warnings():
        traced = torch.jit.trace(PixelModel(part).eval(), _example(part))
        torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(dict(metadata)).encode()})
    return buffer.getvalue()


def _read_torchscript(path: Path) -> PixelFunction:
    with _no_torchscript_warnings():
        return torch.jit.load(path, map_location="cpu")


def _export_program(part: ModelPart) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(PixelModel(part).eval(), (_example(part),), dynamic_shapes=dynamic)


def _example(part: ModelPart) -> Tensor:
    return torch.rand(2, *part.shape)  # not one image: exporters treat a size of 1 as a constant


def _torch_export_bytes(part: ModelPart, metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_export_program(part), buffer, extra_files={METADATA: json.dumps(dict(metadata))})
    return buffer.getvalue()


def _read_torch_export(path: Path) -> PixelFunction:
    # not the path: PyTorch warns of names that do not end in .pt2, such as that of the unfinished file
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _onnx_bytes(part: ModelPart, metadata: Metadata) -> bytes:
    size = _bytes_of(part.module)
    if size > PROTOBUF_LIMIT - GRAPH_BYTES:
        raise ExportError(
            f"--format onnx: {size:,} bytes of weights, but an ONNX file must be smaller than 2 GiB; use torch-export"
        )
    program = torch.onnx.export(
        PixelModel(part).eval(),
        (_example(part),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=[part.output],
        dynamic_shapes=({0: "batch"},),
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _read_onnx(path: Path) -> PixelFunction:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_PIXELS = "0..1 (pixel / {full}), not normalized: the normalization is in the model"
FORMATS = {
    "safetensors": FileFormat(
        ".safetensors",
        "normalized: (pixel / {full} - mean) / std",
        _safetensors_bytes,
        _read_safetensors,
    ),
    "torchscript": FileFormat(".pt", _PIXELS, _torchscript_bytes, _read_torchscript),
    "torch-export": FileFormat(".pt2", _PIXELS, _torch_export_bytes, _read_torch_export),
    "onnx": FileFormat(".onnx", _PIXELS, _onnx_bytes, _read_onnx, ("onnx", "onnxruntime", "onnxscript")),
}
