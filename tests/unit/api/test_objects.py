"""Objects of Python in place of an encoder, a loss and images: frozen by name, asked for again, never imported."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpc_supcon as hs
from hpc_supcon import cli, parts
from hpc_supcon.errors import CodeNotAllowed, ConfigError, DataError, PartError, RunFolderError
from tests.unit.api.conftest import FAST, Tiny

WITH_SOURCE = {key: value for key, value in FAST.items() if key != "data.train_images"}


def supcon(embeddings, labels):
    """The outside form (Khosla et al. 2020, equation 2), densely, at temperature 0.1."""
    z, y = embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])
    same = torch.eye(len(z), dtype=torch.bool)
    similarities = (z @ z.T / 0.1).masked_fill(same, -torch.inf)
    logs = similarities - similarities.logsumexp(1, keepdim=True)
    positives = (y[:, None] == y) & ~same
    return -(logs.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, embeddings, labels):
        return supcon(embeddings, labels) * self.scale


@pytest.fixture(scope="module")
def own(tmp_path_factory, digits):
    """A run of an encoder, a loss and images of Python; its folder is only read."""
    folder = tmp_path_factory.mktemp("own") / "run"
    return hs.pretrain("quickstart", run_dir=folder, settings=WITH_SOURCE, source=digits, encoder=Tiny, loss=supcon)


def test_a_loss_of_python_trains_as_the_same_loss_of_this_package(own, digits, tmp_path):
    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=WITH_SOURCE, source=digits, encoder=Tiny)
    assert own.config.loss.name == "tests.unit.api.test_objects:supcon"
    assert own.metrics.column("loss") == pytest.approx(run.metrics.column("loss"), rel=1e-4)
    ours, theirs = own.embed(digits[1]), run.embed(digits[1])
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_object_that_was_given_is_left_as_it_was(digits, tmp_path):
    encoder, loss = Tiny(), Scaled()
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    run = hs.pretrain(
        "quickstart", run_dir=tmp_path / "r", settings=WITH_SOURCE, source=digits, encoder=encoder, loss=loss
    )
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    assert float(loss.scale.detach()) == 1.0
    assert not torch.equal(run.encoder.conv.weight, before["conv.weight"])


def test_the_run_folder_says_what_it_was_trained_with(own):
    record = json.loads((own.dir / "parts.json").read_text())
    names = {name.partition(" ")[0]: name.partition(" ")[2] for name in record}
    assert names["encoders"] == "tests.unit.api.conftest:Tiny" == own.config.model.encoder
    assert names["losses"] == "tests.unit.api.test_objects:supcon"
    assert names["sources"].startswith("torch.utils.data.dataset:TensorDataset.d")
    assert all(len(entry["sha256"]) == 64 for entry in record.values())


def test_a_folder_alone_shows_numbers_and_asks_for_the_objects(own, digits):
    before = parts.allowed()
    run = hs.load(own.dir)
    assert run.metrics == own.metrics
    assert "tests.unit.api.conftest:Tiny" in repr(run)
    with pytest.raises(CodeNotAllowed, match=r"model\.encoder=\S+Tiny: .* hs\.load\(RUN_DIR, encoder=\.\.\.\)"):
        run.encoder  # noqa: B018
    with pytest.raises(CodeNotAllowed, match=r"data\.source=.* hs\.load\(RUN_DIR, source=\.\.\.\)"):
        hs.probe(run, "knn")
    with pytest.raises(CodeNotAllowed, match=r"encoder=\.\.\."):
        hs.embed(own.dir, digits[1])
    assert parts.allowed() == before, "nothing may stay allowed after a call"
    with pytest.raises(SystemExit) as exit:
        cli.main(["embed", str(own.dir), "x.png", "-o", "x.npz"])
    assert exit.value.code == 2


def test_objects_given_again_serve_as_before(own, digits):
    run = hs.load(own.dir, encoder=Tiny, source=digits)
    assert torch.equal(run.embed(digits[1]), own.embed(digits[1]))
    (row,) = hs.probe(run, "knn")
    assert row["probe"] == "knn"
    assert row["test"] == hs.probe(own, "knn")[0]["test"]


def test_another_set_of_the_same_class_is_filed_under_a_name_of_its_own(own, digits):
    (row,) = hs.probe(own, "knn", source=(digits[1], digits[0]))
    assert row["probe"].startswith("knn@torch.utils.data.dataset.TensorDataset.d")
    assert row["probe"] != hs.probe(own, "knn", source=(digits[0], digits[0]))[0]["probe"]
    assert {"knn", row["probe"]} <= set(own.results.column("probe"))


def test_only_those_arguments_are_passed_that_a_factory_takes(tmp_path):
    seen = []

    def factory(image_size, **more):
        seen.append((image_size, sorted(more)))
        return Tiny()

    run = hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=FAST, encoder=factory)
    assert seen[0] == (8, ["in_channels", "out_dim"])
    assert run.config.model.encoder.endswith(
        ":test_only_those_arguments_are_passed_that_a_factory_takes.locals.factory"
    )


def wide(**_):
    encoder = Tiny()
    encoder.feature_dim = 17
    return encoder


@pytest.mark.parametrize(
    ("objects", "error", "told"),
    [
        ({"encoder": 3}, ConfigError, "encoder= is of type int"),
        ({"encoder": nn.Conv2d(1, 4, 3)}, PartError, "its attribute feature_dim is None"),
        ({"encoder": wide}, PartError, r"to \[2, 16\], not to \[2, 17\], \[N, feature_dim\]"),
        ({"encoder": lambda: 3}, PartError, "returned int, not a torch.nn.Module"),
        ({"encoder": lambda: 1 / 0}, PartError, "ZeroDivisionError"),
        ({"loss": 3}, ConfigError, "loss= is of type int"),
        ({"loss": lambda z, y: z.sum((1, 2))}, PartError, r"\[4\], not the loss of the batch"),
        ({"loss": lambda z: z.sum()}, PartError, "TypeError"),
        ({"loss": lambda z, y: torch.zeros(())}, PartError, "does not depend on the embeddings"),
        ({"source": 3}, DataError, "no test split"),
        ({"source": ([1], [2])}, DataError, "item 0"),
        ({"source": (TensorDataset(torch.zeros(4, 1, 8, 8)),) * 2}, DataError, "float32, not uint8"),
    ],
)
def test_objects_that_do_not_fit_are_refused_before_training(tmp_path, objects, error, told):
    with pytest.raises(error, match=told):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=WITH_SOURCE, **objects)
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_run_is_not_resumed_with_other_code(tmp_path, monkeypatch):
    module = type(sys)("mine")
    module.__file__ = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("# one")
    monkeypatch.setitem(sys.modules, "mine", module)

    class Net(Tiny):
        __module__ = "mine"

    settings = {**FAST, "train.iterations": 2}
    hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, encoder=Net)
    (tmp_path / "mine.py").write_text("# two")
    with pytest.raises(hs.HpcSupconError, match="the code is not that which the run was started with"):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, encoder=Net, resume=True)
    with pytest.raises(
        RunFolderError, match=r"other settings \(model\.encoder: mine:\S+ -> tests\.unit\.api\.conftest:Tiny"
    ):
        hs.pretrain("quickstart", run_dir=tmp_path / "r", settings=settings, encoder=Tiny, resume=True)


def test_an_object_for_a_run_that_has_none_is_refused(run):
    with pytest.raises(ConfigError, match=r"was trained with model\.encoder=conv, which needs no object"):
        hs.load(run.dir, encoder=Tiny)
