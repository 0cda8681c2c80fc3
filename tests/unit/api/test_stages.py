"""The stages as functions: the numbers of the command line, the same errors, and a process that is left as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import hpc_supcon as hs
from hpc_supcon import checkpoint, cli
from hpc_supcon.errors import CallbackError, ConfigError, MissingExtra, OutputError, RunFolderError
from hpc_supcon.export import load_part
from tests.unit.api.conftest import FAST


def weights(folder):
    step = checkpoint.list_steps(folder / "checkpoints")[-1]
    return load_file(folder / f"checkpoints/step-{step}/model.safetensors")


def test_a_run_of_python_is_that_of_the_command_line_to_the_bit(run, tmp_path):
    overrides = [f"{key}={json.dumps(value)}" for key, value in FAST.items()]
    cli_folder = tmp_path / "cli"
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "quickstart", *overrides, f"run_dir={cli_folder}"])
    assert exit.value.code == 0
    ours, theirs = weights(run.dir), weights(cli_folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_tells_its_numbers_model_and_pictures(run):
    assert [row["step"] for row in run.metrics.where(event="train")] == [2, 4, 6]
    assert run.config.data.batch_size == 64
    assert run.results[0]["probe"] == "knn"
    assert {"training", "loss-pretrain", "confusion-knn"} <= set(run.plots)
    assert not run.encoder.training
    assert "step 6, finished, knn 0." in repr(run)
    again = hs.load(run.dir)
    assert again.metrics == run.metrics
    assert all(torch.equal(a, b) for a, b in zip(again.encoder.parameters(), run.encoder.parameters(), strict=True))


def test_images_of_any_form_are_embedded_as_the_exported_model_does(run, digits, tmp_path):
    images = digits[0].tensors[0][:70]
    expected = load_part(run.dir, "encoder")(images)
    assert torch.allclose(run.embed(images), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(run.encoder(run.transform(images)), expected, atol=1e-5)
        projected = run.embed(images, part="projection", batch_size=7)
        assert torch.allclose(run.projection(expected), projected, atol=1e-5)
    assert torch.allclose(projected.norm(dim=1), torch.ones(70), atol=1e-5)
    assert torch.allclose(hs.embed(run.dir, torch.utils.data.Subset(digits[0], range(70))), expected, atol=1e-5)
    assert torch.allclose(run.embed(images[3]), expected[3:4], atol=1e-5)
    assert torch.allclose(run.embed(images.expand(-1, 3, -1, -1)), expected, atol=1e-5), "gray again"
    from PIL import Image

    for i in range(3):
        Image.fromarray(images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    assert torch.allclose(run.embed(tmp_path), expected[:3], atol=1e-5)
    assert torch.allclose(run.embed([tmp_path / "2.png"]), expected[2:3], atol=1e-5)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(2, 1, 8, 8), "float32 .* not uint8"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), r"uint8 \[2, 2, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), r"\[0, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), "9x8 pixels are not square"),
        ("nowhere.png", "nowhere.png does not exist"),
        (7, "no length"),
    ],
)
def test_images_that_are_none_are_refused_by_name(run, images, told):
    with pytest.raises(hs.HpcSupconError, match=told):
        run.embed(images)


def test_settings_are_checked_as_on_the_command_line(tmp_path):
    for config, settings, told in [
        ("quickstart", {"optim.lrr": 0.1}, "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("quickstart", {"optim": {"lr": "fast"}}, "optim.lr"),
        ("quickstart", {"optim.lr": object()}, "settings: optim.lr: a value of type object"),
        ("quickstart", {3: 4}, "3 is no name of a setting"),
        ("quickstar", {}, "did you mean 'quickstart'"),
        ({"base": "quickstar"}, {}, "did you mean 'quickstart'"),
        ({"data.views": 1, "loss.name": "simclr"}, {}, "needs data.views of 2 or more"),
        (7, {}, "config is of type int"),
    ]:
        with pytest.raises(ConfigError, match=told):
            hs.pretrain(config, run_dir=tmp_path / "r", settings=settings)
    assert not (tmp_path / "r").exists()


def test_a_used_run_folder_is_refused_and_nothing_is_no_run(run, tmp_path):
    with pytest.raises(RunFolderError, match="already used"):
        hs.pretrain("quickstart", run_dir=run.dir, settings=FAST)
    for call in (hs.load, hs.probe, hs.prune, hs.report, lambda path: hs.embed(path, tmp_path)):
        with pytest.raises(RunFolderError, match="not a run folder"):
            call(tmp_path)
    with pytest.raises(RunFolderError, match=r"no picture 'trainings'.* training"):
        run.show("trainings")
    with pytest.raises(ConfigError, match="which run"):
        hs.report()
    with pytest.raises(ConfigError, match="unknown part 'classifier'"):
        run.embed(tmp_path, part="classifier")


def test_a_page_of_one_run_and_of_two(run, tmp_path, monkeypatch):
    assert hs.report(run) == run.dir / "report.html"
    (tmp_path / "other.html").write_text("mine")
    with pytest.raises(OutputError):
        hs.report(run, out=tmp_path / "other.html")
    page = hs.report(run.dir, out=tmp_path / "page.html")
    assert "supcon_out" in page.read_text()


def test_prune_tells_rates_sizes_and_scores(tmp_path):
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=FAST)
    settings = {"prune": {"rate": [0.5], "finetune": {"epochs": 0}}, "probe.kind": "knn"}
    rows = hs.prune(run, settings=settings)
    assert [(row["stage"], row["prune"]["rate"]) for row in rows] == [("prune", 0.5)]
    pruned = hs.load(run.dir / rows[0]["folder"])
    total = sum(p.numel() for p in pruned.encoder.parameters() if p.ndim > 1)
    zeros = sum(int((p == 0).sum()) for p in pruned.encoder.parameters() if p.ndim > 1)
    assert zeros / total == pytest.approx(0.5, abs=0.01)


def test_the_process_is_left_as_it_was(tmp_path):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    handlers = [signal.signal(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    threads, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings={**FAST, "runtime.threads": torch_threads + 1})
    hs.probe(run, "knn")
    run.embed(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert torch.get_num_threads() == torch_threads
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not dist.is_initialized()
    deadline = time.monotonic() + 30
    while left := {t for t in threading.enumerate() if not t.daemon} - threads:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


class Recorder(hs.Callback):
    def __init__(self, act=None):
        self.seen, self.act = [], act

    def _record(self, name, count, metrics):
        self.seen.append((name, count, metrics.get("loss")))
        if self.act is not None:
            self.act(name, count)

    def on_step(self, step, metrics):
        self._record("step", step, metrics)

    def on_epoch(self, epoch, metrics):
        self._record("epoch", epoch, metrics)

    def on_evaluation(self, step, metrics):
        self._record("evaluation", step, metrics)

    def on_end(self, step, metrics):
        self._record("end", step, metrics)


EVALUATED = {**FAST, "validation.every_epochs": 1, "train.iterations": 8}  # 4 steps per epoch


def test_callbacks_are_called_in_order_with_the_numbers_of_the_log(tmp_path):
    recorder = Recorder()
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=EVALUATED, callbacks=[recorder])
    names = [(name, count) for name, count, _ in recorder.seen]
    assert names == [
        ("step", 2), ("step", 4), ("epoch", 1), ("evaluation", 4), ("step", 6), ("step", 8), ("epoch", 2),
        ("evaluation", 8), ("end", 8),
    ]  # fmt: skip
    for name, event in (("step", "train"), ("evaluation", "validation")):
        told = [(count, loss) for kind, count, loss in recorder.seen if kind == name]
        assert told == [(row["step"], row["loss"]) for row in run.metrics.where(event=event)]


@pytest.mark.parametrize(("name", "count", "step"), [("step", 2, 2), ("epoch", 1, 4), ("evaluation", 4, 4)])
def test_a_callback_that_stops_leaves_a_checkpoint_of_that_step(tmp_path, name, count, step):
    def act(*seen):
        if seen == (name, count):
            raise hs.StopTraining("seen enough")

    recorder = Recorder(act)
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=EVALUATED, callbacks=[Recorder(), recorder])
    assert checkpoint.list_steps(run.dir / "checkpoints")[-1] == step
    assert recorder.seen[-1][:2] == ("end", step)
    assert '"reason": "seen enough"' in (run.dir / "metrics.jsonl").read_text()
    assert "finished" in repr(run)


def test_a_callback_that_raises_is_named_and_the_run_goes_on_when_it_is_resumed(tmp_path):
    def act(name, count):
        if (name, count) == ("step", 6):
            raise KeyError("accuracy")

    settings = {**EVALUATED, "checkpoint.every_steps": 4}
    with pytest.raises(CallbackError, match=r"Recorder.on_step raised KeyError at 6: 'accuracy'") as raised:
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, callbacks=[Recorder(act)])
    chain = []
    error = raised.value
    while error is not None:
        chain.append(type(error))
        error = error.__cause__
    assert KeyError in chain
    again = Recorder()
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, callbacks=[again], resume=True)
    assert [count for name, count, _ in again.seen if name == "step"] == [6, 8]
    whole = hs.pretrain("quickstart", run_dir=tmp_path / "w", settings=settings)
    assert all(torch.equal(a, weights(whole.dir)[name]) for name, a in weights(run.dir).items())


def test_ctrl_c_saves_the_step_under_way_and_the_run_goes_on(tmp_path):
    def act(name, count):
        if (name, count) == ("step", 4):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    settings = {**FAST, "train.iterations": 8}
    with pytest.raises(KeyboardInterrupt):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, callbacks=[Recorder(act)])
    assert signal.getsignal(signal.SIGINT) is handler
    saved = checkpoint.list_steps(tmp_path / "r" / "checkpoints")[-1]
    assert saved in (4, 5), "not at the end of this step or the next"
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, resume=True)
    whole = hs.pretrain("quickstart", run_dir=tmp_path / "w", settings=settings)
    assert all(torch.equal(a, weights(whole.dir)[name]) for name, a in weights(run.dir).items())


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def act(name, count):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    with pytest.raises(KeyboardInterrupt):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=FAST, callbacks=[Recorder(act)])
    assert not checkpoint.list_steps(tmp_path / "r" / "checkpoints")


def test_a_stage_inside_of_another_is_refused(run, tmp_path):
    with pytest.raises(CallbackError, match=r"hs\.probe was called while hs\.pretrain runs"):
        hs.pretrain(
            "quickstart",
            run_dir=tmp_path / "r",
            settings=FAST,
            callbacks=[Recorder(lambda name, count: hs.probe(run, "knn"))],
        )


def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"hpc-supcon\[wandb\]"):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings={**FAST, "log.to": "wandb"})
