"""The command line of the benchmarks: `hpc-supcon bench loss | loader | step | gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Debug
from .data import DataSettings, data_settings

bench = typer.Typer(help="Measure parts of the pipeline on this machine.", no_args_is_help=True)


@bench.command("loss")
def bench_loss(
    size: Annotated[list[int] | None, typer.Option(help="Rows N of the batch; repeat for several.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="dense[-tf32] | compiled | pml | reference | tiled | triton[-bf16|-tf32]; repeat."),
    ] = None,
    dim: Annotated[int, typer.Option(help="Embedding size D.")] = 128,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    runs: Annotated[int, typer.Option(help="Timed rounds; the best is reported, median and worst are written.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's own choice.")] = 0,
    tag: Annotated[str, typer.Option(help="Added to the names of the result files.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the JSON and PNG files.")] = Path("benchmarks/results"),
    debug: Debug = False,
) -> None:
    """Time and peak memory of the contrastive loss, against dense PyTorch and pytorch-metric-learning."""
    import torch

    from ..bench.loss import measure
    from ..distributed.devices import choose_device

    kind = choose_device(device).type
    contenders = only or ["dense", "compiled", "pml", "triton" if kind == "cuda" else "tiled"]
    measure(
        size or [1024, 2048, 4096, 8192], dim, contenders, kind, runs, threads or torch.get_num_threads(), tag, out
    )


@bench.command("loader")
def bench_loader(
    settings: DataSettings = None,
    data: Annotated[Path | None, typer.Option(help="An image folder of small images, such as CIFAR-10.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Images per batch; repeat for several.")] = None,
    workers: Annotated[list[int] | None, typer.Option(help="Decoding workers; repeat for several.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="torchvision | resident | torch | ffcv | ffcv-decode-twice | dali; repeat for several."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    policy: Annotated[str, typer.Option(help="flip_crop | simaugment (with color jitter and gray)")] = "simaugment",
    seconds: Annotated[float, typer.Option(help="Length of a timed round.")] = 4.0,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the best is reported, the worst is written.")] = 2,
    tag: Annotated[str, typer.Option(help="Added to the names of the result files.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the JSON and PNG files.")] = Path("benchmarks/results"),
    debug: Debug = False,
) -> None:
    """Images/s of every loader, two views delivered on the device, against torchvision's ImageFolder."""
    from ..bench.loader import CONTENDERS, measure
    from ..distributed.devices import choose_device

    kind = choose_device(device).type
    own = data_settings(settings, "data.root", "data.source", "data.beton")
    sizes, counts, names = batch_size or [512], workers or [2], only or CONTENDERS
    measure(data, own, sizes, counts, names, kind, policy, seconds, rounds, tag, out)


@bench.command("step")
def bench_step(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings, such as augment.policy=flip_crop.")
    ] = None,
    encoder: Annotated[list[str] | None, typer.Option(help="Encoder; repeat for several.")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Images per step; repeat for several. By default 32, 64, ... until memory ends."),
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32 | bf16 | auto; repeat for several.")] = None,
    compile_: Annotated[
        list[bool] | None, typer.Option("--compile", help="false | true: torch.compile; repeat for both.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    seconds: Annotated[float, typer.Option(help="Measured for each row, in three rounds.")] = 3.0,
    longest: Annotated[
        float, typer.Option(help="Seconds: no larger batch is tried after a step that takes longer.")
    ] = 5.0,
    memory: Annotated[float, typer.Option(help="GiB that a step may take; 0: all that is free.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's own choice.")] = 0,
    plain: Annotated[bool, typer.Option(help="Compare with a plain PyTorch loop.")] = True,
    tag: Annotated[str, typer.Option(help="Added to the names of the result files.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the JSON and PNG files.")] = Path("benchmarks/results"),
    debug: Debug = False,
) -> None:
    """Views/s, peak memory and where the time goes, over batch sizes; recommends one for this machine."""
    import torch

    from ..bench.step import Limits, measure
    from ..distributed.devices import choose_device

    kind = choose_device(device).type
    measure(
        encoder or ["conv", "resnet18"],
        batch_size,
        precision or (["fp32"] if kind == "cpu" else ["fp32", "bf16"]),
        compile_ or [False],
        overrides or [],
        kind=kind,
        limits=Limits(seconds, longest, int(memory * 2**30) or None),
        threads=threads or torch.get_num_threads(),
        plain=plain,
        tag=tag,
        out=out,
    )


@bench.command("gpu")
def bench_gpu_command(
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 540.0,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda; on a CPU everything runs in miniature.")] = "auto",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="machine | tests | loss | step | data | training: again if it is done; repeat for several."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="CIFAR-10 as an image folder of JPEGs: train/CLASS/*.jpg, test/CLASS/*.jpg.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; one that was begun is completed.")] = Path("gpu"),
    page: Annotated[bool, typer.Option("--page", help="Measure nothing: make report.md anew.")] = False,
    debug: Debug = False,
) -> None:
    """Test and measure everything on one GPU within a budget of seconds; tables in OUT/report.md."""
    from ..bench.gpu import bench_gpu, write_report

    if page:
        write_report(out)
    elif not bench_gpu(budget, out, device, only or [], data):
        raise typer.Exit(1)
