"""Writes a part of a run's model to a file, which is read back and compared with the model before it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..data import dtype_of, full_scale, random_levels
from ..errors import ConfigError, ExportError, MissingExtra, first_line, unknown_name
from ..files import check_output, output_file
from .formats import FORMATS, FileFormat, PixelFunction, metadata_of
from .parts import ModelPart, load_part

TOLERANCE = 1e-4
"""Largest allowed difference of outputs, relative to the largest output if that is above 1. Float32 sums in another
order differ by about 1e-6."""
CHECKED_BATCHES = (1, 5)
"""Batch sizes at which a file is compared with the model."""


@dataclass(frozen=True)
class ExportedFile:
    """A file whose outputs are those of the model."""

    path: Path
    bytes: int
    difference: float
    """Largest absolute difference from the model's outputs on random images."""


def export_part(
    folder: Path,
    format: str,
    *,
    part: str = "encoder",
    probe: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> ExportedFile:
    """Write a part of the run in `folder` (see load_part) to `out`, in one of FORMATS.

    out: by default NAME-PART.SUFFIX in the working directory, with the NAME of the run folder. force: replace an
    existing file.

    Raises ConfigError, RunFolderError, CheckpointCorrupt, MissingExtra and OutputError before any work; ExportError,
    leaving no file, if the format cannot represent the model or the file gives other outputs.
    """
    if format not in FORMATS:
        raise ConfigError("--format: " + unknown_name("format", format, FORMATS))
    file_format = FORMATS[format]
    missing = [name for name in file_format.needs if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"--format {format} needs {', '.join(missing)}: pip install 'hpc-supcon[export]'")
    path = out or Path(f"{folder.resolve().name}-{part}{file_format.suffix}")
    check_output(path, force=force)
    loaded = load_part(folder, part, probe)
    content = _convert(loaded, format)
    with output_file(path, force=force) as partial:
        partial.write_bytes(content)
        difference = _verify(loaded, file_format, partial, f"--format {format}")
    return ExportedFile(path, len(content), difference)


def _convert(part: ModelPart, format: str) -> bytes:
    try:
        return FORMATS[format].to_bytes(part, metadata_of(part, format))
    except ExportError:
        raise
    except Exception as error:  # exporters raise many types for a model that they cannot trace
        cause: BaseException = error
        while cause.__cause__ is not None:  # PyTorch's say which step failed, and their cause says why
            cause = cause.__cause__
        raise ExportError(
            f"--format {format} cannot represent this {part.name}: {first_line(cause)}; try another format"
        ) from error


def _verify(part: ModelPart, file_format: FileFormat, file: Path, what: str) -> float:
    """The largest difference between the outputs of file and model. Raises ExportError above the tolerance."""
    generator = torch.Generator().manual_seed(0)
    batches = [random_levels((n, *part.shape), dtype_of(part.bits), generator) for n in CHECKED_BATCHES]
    try:
        function = file_format.read(file)
        return max(_difference(part, function, images, what) for images in batches)
    except ExportError:
        raise
    except Exception as error:  # runtimes raise many types for a file that they cannot run
        raise ExportError(f"{what}: the file cannot be used: {first_line(error)}; it is not kept") from error


@torch.no_grad()
def _difference(part: ModelPart, function: PixelFunction, images: Tensor, what: str) -> float:
    expected, actual = part(images), function(images.float() / full_scale(images.dtype))
    if actual.shape != expected.shape:
        raise ExportError(
            f"{what}: for {len(images)} images the file gives {list(actual.shape)}, the model {list(expected.shape)}"
        )
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # NaN fails as well
        raise ExportError(f"{what}: the file's outputs differ from the model's by {difference:.2g}; it is not kept")
    return difference
