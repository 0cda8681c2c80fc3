"""The benchmark of the step: its rows, a full memory, its recommendation, and the comparison with a plain loop."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc_supcon.bench import step, step_compare
from hpc_supcon.bench.plain_loop import PilImages, PlainLoop, TwoCrops, sample_transform
from hpc_supcon.bench.step import Limits, StepRow, recommend, run_rows
from hpc_supcon.bench.step_compare import build_plain_loop
from hpc_supcon.cli import main
from hpc_supcon.distributed import launch
from hpc_supcon.losses import SupConLoss

SMALL = ["data.synthetic={images: 64, image_size: 8}", "model.projection_hidden=16"]


def row(encoder, batch_size, rate, status="ok", precision="fp32"):
    return StepRow(encoder, precision, False, batch_size, status, views_per_s=rate)


def test_the_smallest_batch_that_is_nearly_the_fastest_is_recommended():
    rows = [
        row("conv", 32, 80.0),
        row("conv", 64, 95.5),
        row("conv", 128, 100.0),
        row("conv", 256, 0.0, "out of memory"),
    ]
    rows += [row("conv", 32, 90.0, precision="bf16"), row("resnet18", 32, 7.0), row("big", 32, 0.0, "out of memory")]
    conv, resnet, big = recommend(rows)
    assert conv.startswith("conv: data.batch_size=64 (fp32) gives 96 views/s, the best being 100;")
    assert conv.endswith("the largest that fits: 128")
    assert resnet.endswith("32 (larger ones were not tried)")
    assert big == "big: no batch size fits this machine"


@pytest.mark.usefixtures("forked_not_spawned")
def test_a_full_memory_gives_a_row_and_no_crash():
    rows = [StepRow("conv", "fp32", False, size, "") for size in (8, 1 << 16, 1 << 17)]
    overrides = ["data.synthetic={images: 131072, image_size: 8, channels: 1}"]
    found = run_rows(rows, overrides, "cpu", Limits(0.01, 600.0, 512 << 20), 1)
    assert [(r.batch_size, r.status) for r in found] == [(8, "ok"), (1 << 16, "out of memory")]
    assert found[0].views_per_s > 0
    assert sum(found[0].seconds.values()) == pytest.approx(16 / found[0].views_per_s)
    assert 0 < found[0].peak_bytes < 512 << 20


@pytest.mark.usefixtures("forked_not_spawned")
def test_the_command_writes_rows_comparison_and_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        step, "run_rows", lambda rows, *a: [step.measure_row(r, SMALL, torch.device("cpu"), 0.01) for r in rows]
    )
    sizes = ["--batch-size", "16", "--batch-size", "32"]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "bench",
                "step",
                "--encoder",
                "conv",
                *sizes,
                "--seconds",
                "0.01",
                "--threads",
                "1",
                "--out",
                str(tmp_path),
                *SMALL,
            ]
        )
    assert not done.value.code
    record = json.loads(next(tmp_path.glob("*-step-cpu.json")).read_text())
    assert [r["batch_size"] for r in record["results"]] == [16, 32]
    (comparison,) = record["against_plain_loop"]
    assert comparison["batch_size"] == 32
    assert comparison["ratio"] == pytest.approx(comparison["ours"] / comparison["plain"])
    assert record["advice"][0] in capsys.readouterr().out
    assert next(tmp_path.glob("*-step-cpu.png")).stat().st_size > 10_000


def numerics():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return deterministic, torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_measured_step_computes_as_a_run_of_the_same_settings_does(deterministic, monkeypatch):
    before = numerics()
    try:
        with launch.start(device="cpu", deterministic=deterministic):
            want = numerics()
        launch.set_numerics(not deterministic)
        config = step.step_config("conv", "fp32", False, 16, [*SMALL, f"deterministic={str(deterministic).lower()}"])
        with closing(step.StepSession(config, torch.device("cpu"))):
            assert numerics() == want
        launch.set_numerics(not deterministic)
        monkeypatch.setattr(step_compare, "build_plain_loop", lambda *a: SimpleNamespace(run=lambda: None))
        ours, theirs = multiprocessing.Pipe()
        ours.close()
        with pytest.raises(OSError):  # the child's code, in this process; nobody waits for its first answer
            step_compare._child(theirs, config, 1, torch.device("cpu"), 1)
        assert numerics() == want
    finally:
        launch.set_numerics(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.set_float32_matmul_precision(before[2])


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--encoder", "resnet19"], "did you mean"),
        (["--precision", "fp8"], "precision"),
        (["--batch-size", "0"], "batch_size"),
        (["augment.policy=autoaugment"], "--no-plain"),
        (["loss.name=tcl"], "--no-plain"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, fragment, capsys, monkeypatch):
    monkeypatch.setattr(step, "machine", None)
    monkeypatch.setattr(step, "run_rows", None)
    with pytest.raises(SystemExit) as done:
        main(["bench", "step", *arguments])
    assert done.value.code == 2
    assert fragment in capsys.readouterr().err


def test_the_plain_loop_minimizes_the_same_loss():
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    data = PilImages(images, labels, TwoCrops(sample_transform(8, [0.5] * 3, [0.25] * 3, "simaugment")))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loop = PlainLoop(encoder, nn.Linear(5, 4), data, batch_size=6, steps=1, lr=0.0, device=torch.device("cpu"))
    views = [torch.randn(6, 3, 8, 8) for _ in range(2)]
    loop.step(views, labels[:6])
    embeddings = torch.stack([loop.head(encoder(v)) for v in views], 1)
    assert loop.losses[0] == pytest.approx(SupConLoss(0.1)(embeddings, labels[:6]).item(), rel=1e-5)
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_plain_loop_starts_from_the_same_weights_on_the_same_images():
    config = step.step_config("conv", "fp32", False, 16, SMALL)
    loop = build_plain_loop(config, 1, torch.device("cpu"))
    with closing(step.StepSession(config, torch.device("cpu"))) as session:
        model, train = session.training.state.model, session.data.splits.train
    assert torch.equal(torch.from_numpy(loop.loader.dataset.arrays).permute(0, 3, 1, 2), train.stack())
    ours = model.encoder.state_dict() | model.heads["projection"].state_dict(prefix="head.")
    for name, plain in (loop.encoder.state_dict() | loop.head.state_dict(prefix="head.")).items():
        assert torch.equal(plain, ours[name]), name


def test_the_plain_loops_images_are_the_sources():
    images = torch.arange(2 * 1 * 4 * 5, dtype=torch.uint8).view(2, 1, 4, 5)
    for stack in (images, images.expand(-1, 3, -1, -1)):
        data = PilImages(stack, torch.tensor([1, 0]), lambda image: image)
        image, label = data[1]
        assert label == 0
        assert list(image.convert("L").tobytes()) == images[1].flatten().tolist()
