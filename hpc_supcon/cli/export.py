"""The commands `hpc-supcon export | embed | predict`: a run's trained model, used outside of the run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, printable, unknown_name
from ..run_folder import read_config
from ..terminal import output
from .common import Debug, progress_bars

if TYPE_CHECKING:
    from ..export import ImageSet, Predictions

SHOWN = 20
"""Predictions of up to this many images are printed as a table; those of more images as CSV."""

SHOWN_CLASSES = 5

DEVICES = ("auto", "cpu", "cuda")

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")]
ImagePaths = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGES_OR_FOLDER", help="Image files, folders (of any depth), or one .beton file."),
]
Probe = Annotated[str | None, typer.Option(help="Which fitted probe of RUN_DIR/probes; by default the only one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
SkipCorrupt = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be used, and list them.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda")]


def export(
    run_dir: RunDir,
    format: Annotated[str, typer.Option("--format", help="safetensors | torchscript | torch-export | onnx")],
    part: Annotated[str, typer.Option(help="encoder | projection | classifier")] = "encoder",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write; by default NAME-PART.SUFFIX, here.")
    ] = None,
    probe: Probe = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a run's model to one file that other programs load, and compare the file with the model."""
    from ..export import export_part

    written = export_part(run_dir, format, part=part, probe=probe, out=out, force=force)
    sys.stdout.write(
        f"{printable(written.path)}: {written.bytes:,} bytes; read back, its outputs differ from the model's by "
        f"{written.difference:.1g} at most\n"
    )


def embed(
    run_dir: RunDir,
    images: ImagePaths,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .npz file to write.")],
    part: Annotated[str, typer.Option(help="encoder | projection")] = "encoder",
    batch_size: BatchSize = 256,
    device: Device = "auto",
    skip_corrupt: SkipCorrupt = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Embed images by a run's encoder; `embeddings`, `paths` and, where they are known, `labels` go into a .npz."""
    from ..export import embed as embed_images
    from ..export import load_part, open_images
    from ..files import check_output

    if part == "classifier":
        raise ConfigError("--part classifier gives no embeddings: see `hpc-supcon predict`")
    if out.suffix != ".npz":
        raise ConfigError(f"-o {out}: embeddings are written as .npz; choose that ending")
    check_output(out, force=force)
    with _inference_options(device, batch_size, skip_corrupt) as options:
        loaded = load_part(run_dir, part)
        exif = read_config(run_dir).data.exif
        opened = open_images(images, loaded.shape, loaded.classes, exif=exif, bits=loaded.bits)
        outputs = embed_images(loaded, opened, out, force=force, **options)
    _report_left_out(outputs.problems, opened)
    if opened.unknown_classes:
        unknown, more = ", ".join(opened.unknown_classes[:SHOWN_CLASSES]), len(opened.unknown_classes) - SHOWN_CLASSES
        names = f"{unknown} and {more} more" if more > 0 else unknown
        sys.stderr.write(f"labels are left out: not among the classes that {run_dir} was trained on: {names}\n")
    labels = "" if opened.labels is None else ", with labels"
    sys.stdout.write(
        f"{printable(out)}: {len(outputs.indices)} images, {outputs.values.shape[1]} numbers each{labels}\n"
    )


def predict(
    run_dir: RunDir,
    images: ImagePaths,
    probe: Probe = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A .csv or .json file to write.")] = None,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    skip_corrupt: SkipCorrupt = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Classify images by a run's fitted probe: the top class and the probabilities of all."""
    from ..export import load_part, open_images
    from ..export import predict as predict_images
    from ..export.inference import check_suffix, save_predictions, write_csv
    from ..files import check_output

    if out is not None:
        check_suffix(out)
        check_output(out, force=force)
    with _inference_options(device, batch_size, skip_corrupt) as options:
        classifier = load_part(run_dir, "classifier", probe)
        exif = read_config(run_dir).data.exif
        opened = open_images(images, classifier.shape, classifier.classes, exif=exif, bits=classifier.bits)
        predictions = predict_images(classifier, opened, **options)
    _report_left_out(predictions.problems, opened)
    if out is not None:
        save_predictions(predictions, out, checkpoint=classifier.description["checkpoint"], force=force)
        sys.stdout.write(f"{printable(out)}: {len(predictions.paths)} images\n")
    elif len(predictions.paths) <= SHOWN:
        _print(predictions)
    else:
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # file names need not be valid text
        write_csv(predictions, sys.stdout)


@contextmanager
def _inference_options(device: str, batch_size: int, skip_corrupt: bool) -> Iterator[dict[str, Any]]:
    """Arguments of `inference.run_part`, and its device and progress bar for the length of a command."""
    from ..distributed import launch as rt

    if device not in DEVICES:
        raise ConfigError("--device: " + unknown_name("device", device, DEVICES))
    with rt.start(rt.Launch(), device=device) as runtime, progress_bars() as progress:
        yield {
            "device": runtime.device,
            "batch_size": batch_size,
            "skip_corrupt": skip_corrupt,
            "progress": progress,
        }


def _report_left_out(problems: Sequence[str], images: ImageSet) -> None:
    for problem in problems:
        sys.stderr.write(f"left out: {problem}\n")
    for note in images.notes:
        sys.stderr.write(f"{note}\n")


def _print(predictions: Predictions) -> None:
    """A row for each image, with its three most probable classes."""
    console = output()
    table = Table("image", "class", "probability", "then")
    for path, shares in zip(predictions.paths, predictions.probabilities, strict=True):
        first, *others = (-shares).argsort(kind="stable")[:3]
        then = ", ".join(f"{printable(predictions.classes[k])} {shares[k]:.3f}" for k in others)
        name = printable(predictions.classes[first])
        table.add_row(Text(printable(path), overflow="fold"), name, f"{shares[first]:.3f}", then)
    console.print(table)
