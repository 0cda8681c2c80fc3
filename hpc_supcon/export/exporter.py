"""A part of a run into a file that is read back and compared before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, ExportError, MissingExtra, unknown_name
from ..files import check_output, output_file
from .formats import FORMATS, Format, Function, describe
from .parts import Part, load_part

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output where that is above 1: float32 sums in another
order differ by some 1e-6."""
CHECKED_BATCHES = (1, 5)


@dataclass(frozen=True)
class Exported:
    """A file that was written and gave the model's outputs."""

    path: Path
    bytes: int
    difference: float
    """Largest absolute difference to the model's outputs on random images."""


def export_part(
    folder: Path,
    format: str,
    *,
    part: str = "encoder",
    probe: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> Exported:
    """Write a part of the run in `folder` (see load_part) in one of FORMATS to `out`.

    out: None is NAME-PART.SUFFIX in the working directory, NAME that of the run folder. force: replace it.

    Raises ConfigError, RunFolderError, CheckpointCorrupt, MissingExtra and OutputError before work; ExportError
    where the format cannot hold the model, or its file gives other outputs, and then leaves no file.
    """
    if format not in FORMATS:
        raise ConfigError("--format: " + unknown_name("format", format, FORMATS))
    form = FORMATS[format]
    missing = [name for name in form.needs if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"--format {format} needs {', '.join(missing)}: pip install 'hpc-supcon[export]'")
    path = out or Path(f"{folder.resolve().name}-{part}{form.suffix}")
    check_output(path, force=force)
    loaded = load_part(folder, part, probe)
    content = _converted(loaded, format)
    with output_file(path, force=force) as partial:
        partial.write_bytes(content)
        difference = _verified(loaded, form, partial, f"--format {format}")
    return Exported(path, len(content), difference)


def _converted(part: Part, format: str) -> bytes:
    try:
        return FORMATS[format].to_bytes(part, describe(part, format))
    except ExportError:
        raise
    except Exception as error:  # whatever an exporter says of a model that it cannot trace
        raise ExportError(
            f"--format {format} cannot hold this {part.name}: {_first_line(error)}; try another format"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _verified(part: Part, form: Format, file: Path, what: str) -> float:
    """The largest difference between file and model. Raises ExportError where it is above the tolerance."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 256, (n, *part.shape), dtype=torch.uint8, generator=generator) for n in CHECKED_BATCHES
    ]
    try:
        function = form.read(file)
        return max(_difference(part, function, images, what) for images in batches)
    except ExportError:
        raise
    except Exception as error:  # whatever a format's runtime says of a file that it cannot run
        raise ExportError(f"{what}: the file cannot be used: {_first_line(error)}; it is not kept") from error


@torch.no_grad()
def _difference(part: Part, function: Function, images: Tensor, what: str) -> float:
    wanted, got = part(images), function(images.float() / 255)
    if got.shape != wanted.shape:
        raise ExportError(f"{what}: {len(images)} images give {list(got.shape)}, the model {list(wanted.shape)}")
    difference = float((got - wanted).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):  # NaN fails as well
        raise ExportError(f"{what}: the file's outputs differ from the model's by {difference:.2g}; it is not kept")
    return difference
