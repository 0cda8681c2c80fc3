"""File formats by name: a part to bytes, and a file back to a function of pixels."""

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

from ..errors import ExportError
from ..renamed import new_state
from .parts import Part, PixelGraph, build

METADATA = "metadata.json"
"""Name of the metadata inside .pt and .pt2 files; ONNX and safetensors have metadata of their own."""
PROTOBUF_LIMIT = 2**31
_ROOM = 1 << 20  # bytes for what an ONNX file holds besides its weights

Metadata = Mapping[str, str]
Function = Callable[[Tensor], Tensor]
"""float32 [N, C, S, S] in 0..1 -> the part's output."""


@dataclass(frozen=True)
class Format:
    suffix: str
    input: str
    """What the file's model reads."""
    to_bytes: Callable[[Part, Metadata], bytes]
    read: Callable[[Path], Function]
    needs: tuple[str, ...] = ()
    """Optional packages, by import name."""


def describe(part: Part, format: str) -> dict[str, str]:
    """The metadata that goes into the file: text by name. Lists and dictionaries are JSON."""
    from .. import __version__

    description = part.description
    channels, size, _ = part.shape
    about = {
        "made_by": f"hpc-supcon {__version__}",
        "format": format,
        "part": part.name,
        "checkpoint": description["checkpoint"],
        "input": f"float32 [N, {channels}, {size}, {size}], {'gray' if channels == 1 else 'RGB'}, "
        + FORMATS[format].input,
        "resize": f"shorter side to {size} px (bilinear, antialiased), then the central square",
        "output": f"{part.output}, float32 [N, D]",
        "normalization": json.dumps(description["normalization"]),
        "classes": json.dumps(description["classes"]),
        "description": json.dumps(description),
    }
    return about | (_rebuilding(part) if part.name == "encoder" else {})


def _rebuilding(part: Part) -> dict[str, str]:
    """Python expressions whose state dict is that of the encoder: this package's, and timm's where it is the same."""
    encoder = part.description["encoder"]
    options = ", ".join(f"{key}={value!r}" for key, value in encoder.items() if key != "name" and value is not None)
    name, stem = encoder["name"], part.module.stem_kind
    found = {"rebuild": f"hpc_supcon.models.build_encoder({name!r}, {options})"}
    if name in timm.list_models() and stem != "small":
        cfg = timm.get_pretrained_cfg(name)
        fixed = cfg is not None and cfg.fixed_input_size
        sized = f", img_size={encoder['input_size'] or encoder['image_size']}" if fixed else ""
        classes = encoder["out_dim"] or 0
        found["timm"] = (
            f"timm.create_model({name!r}, num_classes={classes}, in_chans={encoder['in_channels']}{sized})"
        )
    return found


def _safetensors_bytes(part: Part, metadata: Metadata) -> bytes:
    tensors = {name: t.detach().clone().contiguous() for name, t in part.module.state_dict().items()}
    return safetensors.torch.save(tensors, metadata=dict(metadata))


def _read_safetensors(path: Path) -> Function:
    with safe_open(path, framework="pt") as file:
        description = new_state(json.loads(file.metadata()["description"]))
    module = build(description)
    module.load_state_dict(safetensors.torch.load_file(path))
    return PixelGraph(Part(module, description)).eval()


@contextmanager
def _torchscript() -> Iterator[None]:
    """PyTorch warns that TorchScript will not be developed further: who asks for the format knows. It warns of
    shapes that became constants: the file is compared with the model in batches of other sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=category)
        yield


def _torchscript_bytes(part: Part, metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    with _torchscript():
        traced = torch.jit.trace(PixelGraph(part).eval(), _example(part))
        torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(dict(metadata)).encode()})
    return buffer.getvalue()


def _read_torchscript(path: Path) -> Function:
    with _torchscript():
        return torch.jit.load(path, map_location="cpu")


def _exported(part: Part) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(PixelGraph(part).eval(), (_example(part),), dynamic_shapes=dynamic)


def _example(part: Part) -> Tensor:
    return torch.rand(2, *part.shape)  # not one image: exporters take a size of 1 for a constant


def _torch_export_bytes(part: Part, metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_exported(part), buffer, extra_files={METADATA: json.dumps(dict(metadata))})
    return buffer.getvalue()


def _read_torch_export(path: Path) -> Function:
    # not the path: what does not end in .pt2 (as the unfinished file) is loaded, but warned of
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _onnx_bytes(part: Part, metadata: Metadata) -> bytes:
    size = _bytes_of(part.module)
    if size > PROTOBUF_LIMIT - _ROOM:
        raise ExportError(
            f"--format onnx: {size:,} bytes of weights, one ONNX file holds less than 2 GiB; use torch-export"
        )
    program = torch.onnx.export(
        PixelGraph(part).eval(),
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


def _read_onnx(path: Path) -> Function:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_PIXELS = "0..1, not normalized: the normalization is in the model"
FORMATS = {
    "safetensors": Format(
        ".safetensors",
        "normalized: (pixel / 255 - mean) / std",
        _safetensors_bytes,
        _read_safetensors,
    ),
    "torchscript": Format(".pt", _PIXELS, _torchscript_bytes, _read_torchscript),
    "torch-export": Format(".pt2", _PIXELS, _torch_export_bytes, _read_torch_export),
    "onnx": Format(".onnx", _PIXELS, _onnx_bytes, _read_onnx, ("onnx", "onnxruntime", "onnxscript")),
}
