"""Evaluation gives the same results on any number of ranks."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.data import Batch, EvalTransform, TrainOrder
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.features import extract
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.evaluation.monitor import monitor
from hpc_supcon.evaluation.probes.finetune import Classifier, train_classifier
from hpc_supcon.evaluation.probes.knn import knn_accuracy
from hpc_supcon.evaluation.probes.optimization import FitPlan
from hpc_supcon.models import build_encoder
from hpc_supcon.run_folder import read_scores
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.stages.probe import probe
from hpc_supcon.training.data import load_data
from hpc_supcon.training.engine import distribute
from tests.dist.ranks import run_ranks

KINDS = ["linear", "softmax", "logistic", "mlp", "knn"]
FAST = [
    "train.epochs=1", f"probe.kind=[{', '.join(KINDS)}]", "probe.linear.epochs=3", "probe.mlp.epochs=3",
    "probe.softmax.iterations=30", "probe.logistic.iterations=30", "probe.logistic.classes=[3, '8']",
    "log.tensorboard=false", "log.progress=false",
]  # fmt: skip


def settings(folder, *more):
    return load_config("quickstart", [*FAST, f"run_dir={folder}", *more])


def on_cpu(rank, world_size):
    return Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))


def shared_features(rank, world_size, folder, n):
    config = settings(folder)
    source = load_data(config, on_cpu(rank, world_size)).splits.test.subset(list(range(n)))
    model, found = load_model(config.folder)
    features, labels = extract(
        model.encoder, source, EvalTransform(**found.state["normalization"]), on_cpu(rank, world_size), batch_size=5
    )
    return features, labels, source.labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = settings(folder)
    pretrain(config, on_cpu(0, 1), load_data(config, on_cpu(0, 1)))
    return folder


def test_metrics_are_identical_on_1_2_and_3_ranks(trained):
    results, scores = [], []
    for world in (1, 2, 3):
        (trained / "scores.json").unlink(missing_ok=True)
        results.append(run_ranks(evaluate_odd, world, trained))
        scores.append(read_scores(trained))
    assert list(scores[0]["embedding"]) == ["encoder", "projection"]
    assert list(scores[0]["ood"]) == ["synthetic"]
    for section in ("embedding", "ood"):
        assert scores[0][section] == scores[1][section] == scores[2][section]
    names = ("probe", "chosen", "iterations", "train", "validation", "test")
    want = [{k: entry[k] for k in names} for entry in results[0][0]]
    assert [entry["probe"] for entry in want] == KINDS
    for entry in want:
        assert 0.3 < entry["test"]["accuracy"] <= 1, entry
    for ranks in results:
        for entries in ranks:
            assert [{k: entry[k] for k in names} for entry in entries] == want


def evaluate_odd(rank, world_size, folder):
    """353 test images and 143 for validation: divisible by neither 2 nor 3."""
    config = settings(folder, "probe.ood=synthetic", "data.synthetic.images=400")
    data = load_data(config, on_cpu(rank, world_size))
    splits = data.splits
    splits = type(splits)(splits.train, splits.validation, splits.test.subset(list(range(353))))
    assert all(len(s) % n for s in (splits.test, splits.validation) for n in (2, 3))
    return probe(config.folder, config, on_cpu(rank, world_size), dataclasses.replace(data, splits=splits))


@pytest.mark.parametrize("n", [2, 17])
def test_every_sample_is_encoded_exactly_once_with_the_same_bits(trained, n):
    whole, labels, want_labels = shared_features(0, 1, trained, n)
    assert torch.equal(labels, want_labels)
    parts = run_ranks(shared_features, 3, trained, n)
    assert torch.equal(torch.cat([p[1] for p in parts]), want_labels)
    assert torch.equal(torch.cat([p[0] for p in parts]), whole)


class FixedBatches:
    """A loader of a fixed list of global batches, of which every rank gets an equal share."""

    steps_per_epoch = 4
    replaced = 0

    def __init__(self, rank, world_size):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(256, (4, 12, 1, 8, 8), generator=generator, dtype=torch.uint8)
        # so that the ranks' shares have different mixes of classes
        self.labels = torch.randint(3, (4, 12), generator=generator).sort(dim=1).values
        size = 12 // world_size
        self.own = slice(rank * size, (rank + 1) * size)

    def epoch(self, epoch, start=0):
        for images, labels in zip(self.images, self.labels, strict=True):
            yield Batch(images[self.own], labels[self.own], labels[self.own])

    def close(self):
        pass


def finetune_in_float64(rank, world_size, encoder_lr):
    torch.manual_seed(3)
    encoder = build_encoder("conv", in_channels=1, image_size=8, out_dim=7)
    model = Classifier(encoder, 3).double()
    parallel = distribute(model, on_cpu(rank, world_size), sync_bn=True)
    loader = FixedBatches(rank, world_size)
    values = iter([(0.5, 0.5), (0.4, 0.6), (0.6, 0.3)])
    plan = FitPlan((0.05,), 3, 12, "sgd", monitor="loss")
    trained = train_classifier(
        model, parallel, loader, lambda x: x.double() / 255, lambda: next(values), plan, encoder_lr=encoder_lr
    )
    return {**model.state_dict(), "lines": trained.history, "kept": trained.iteration}


def test_finetuning_on_2_ranks_equals_one_process_and_keeps_the_best_state():
    (want,) = run_ranks(finetune_in_float64, 1, 0.02)
    assert want["kept"] == 8
    for got in run_ranks(finetune_in_float64, 2, 0.02):
        for name, tensor in want.items():
            if name == "lines":
                for a, b in zip(got[name], tensor, strict=True):
                    assert a == pytest.approx(b, rel=1e-9)
            elif name != "kept":
                torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-10)
    assert [line["iteration"] for line in want["lines"]] == [4, 8, 12]


def finetune_run(rank, world_size, folder):
    config = settings(
        folder, "probe.kind=finetune", "probe.finetune.augment=false", "probe.finetune.epochs=2",
        "probe.finetune.batch_size=64",
    )  # fmt: skip
    return probe(folder, config, on_cpu(rank, world_size), load_data(config, on_cpu(rank, world_size)))[0]


def test_a_finetuned_encoder_is_saved_and_scores_the_same_from_the_file_alone(trained):
    (one,), (two, also) = run_ranks(finetune_run, 1, trained), run_ranks(finetune_run, 2, trained)
    assert {**two, "seconds": 0} == {**also, "seconds": 0}
    assert one["test"]["accuracy"] == pytest.approx(two["test"]["accuracy"], abs=0.02)  # fp32, 40 updates
    fitted = load_probe(trained / "probes/finetune")
    source = load_data(settings(trained), on_cpu(0, 1)).splits.test
    logits = fitted.logits(source.stack())
    assert fitted.input == "images"
    assert float((logits.argmax(1) == source.labels).double().mean()) == pytest.approx(two["test"]["accuracy"])
    model, _ = load_model(trained)
    fine, frozen = dict(fitted.encoder.state_dict()), model.encoder.state_dict()
    assert any(not torch.equal(fine[name], frozen[name]) for name in frozen), "the encoder was trained as well"


def chosen_checkpoint(rank, world_size, folder):
    return load_model(folder)[1].path.name


def save_steps(folder, steps, **state):
    """Copies of a real checkpoint as these steps; `state` is added to the state of the last one."""
    found = load_model(folder)[1]
    for step in steps:
        checkpoint.save_checkpoint(
            folder / "checkpoints",
            step,
            found.tensors,
            {**found.state, "step": step, **(state if step == steps[-1] else {})},
            world_size=1,
            config_digest="",
            keep=10,
        )


def test_all_ranks_load_the_checkpoint_that_rank_0_chooses(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    first = load_model(folder)[1].state["step"]
    save_steps(folder, [first + 1, first + 2, first + 3], stopping={"best_at": first + 1})
    assert run_ranks(chosen_checkpoint, 2, folder) == [f"step-{first + 1}"] * 2
    damaged = folder / f"checkpoints/step-{first + 1}/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert run_ranks(chosen_checkpoint, 2, folder) == [f"step-{first + 3}"] * 2
    assert load_model(folder)[1].path.name == f"step-{first + 3}"
    assert f"taking step-{first + 3} in place of the best" in capsys.readouterr().err


def knn_shares(rank, world_size, bank, labels, queries, query_labels, bounds):
    own = slice(bounds[rank], bounds[rank + 1])
    return knn_accuracy(bank[own], labels[own], queries[own], query_labels[own], classes=3, k=5, temperature=0.1)


def test_training_rows_of_all_ranks_vote():
    bank, labels = torch.randn(31, 4), torch.randint(3, (31,))
    queries, query_labels = torch.randn(17, 4), torch.arange(17) % 3
    (want,) = run_ranks(knn_shares, 1, bank, labels, queries, query_labels, [0, 31])
    for bounds in ([0, 9, 31], [0, 0, 31]):
        assert run_ranks(knn_shares, 2, bank, labels, queries, query_labels, bounds) == [want] * 2


def monitored(rank, world_size, folder, kind):
    config = settings(folder)
    splits = load_data(config, on_cpu(rank, world_size)).splits
    model, found = load_model(folder)
    model.train()
    model.encoder.latent.eval()  # a module in eval mode must stay in eval mode
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generators = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    numbers = monitor(
        model.encoder, splits.train, splits.validation, EvalTransform(**found.state["normalization"]),
        on_cpu(rank, world_size), kind=kind, images=301, k=7, epochs=2,
    )  # fmt: skip
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert [random.getstate(), str(np.random.get_state())] == generators[1:]
    assert model.encoder.training
    assert not model.encoder.latent.training
    assert torch.is_grad_enabled()
    return numbers


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_monitoring_changes_nothing_and_gives_the_same_on_any_number_of_ranks(trained, kind):
    (want,) = run_ranks(monitored, 1, trained, kind)
    assert 0.2 < want["accuracy"] <= 1
    assert set(want) == ({"accuracy"} if kind == "knn" else {"accuracy", "loss"})
    assert run_ranks(monitored, 3, trained, kind) == [want] * 3


def test_monitoring_by_knn_equals_scikit_learn(trained):
    """One neighbor among 301 evenly strided images."""
    config = settings(trained)
    splits = load_data(config, on_cpu(0, 1)).splits
    model, found = load_model(trained)
    transform = EvalTransform(**found.state["normalization"])
    rows = [i * len(splits.train) // 301 for i in range(301)]
    with torch.no_grad():
        encode = model.encoder.eval()
        bank = encode(transform(splits.train.stack()[rows])).numpy()
        queries = encode(transform(splits.validation.stack())).numpy()
    want = KNeighborsClassifier(1, metric="cosine").fit(bank, splits.train.labels[rows].numpy())
    got = monitor(
        model.encoder, splits.train, splits.validation, transform, on_cpu(0, 1), kind="knn", images=301, k=1
    )  # fmt: skip
    assert got["accuracy"] == pytest.approx(want.score(queries, splits.validation.labels.numpy()))
    with pytest.raises(ConfigError, match="k=302"):
        monitor(model.encoder, splits.train, splits.validation, transform, on_cpu(0, 1), images=301, k=302)
    with pytest.raises(ConfigError, match="did you mean 'knn'"):
        monitor(model.encoder, splits.train, splits.validation, transform, on_cpu(0, 1), kind="knm")


ON_IMAGES = (
    "probe.kind=[linear, mlp]", "probe.linear.input=images", "probe.linear.standardize=false",
    "probe.linear.lrs=[0.01, 0.1]", "probe.linear.optimizer=sgd", "probe.linear.epochs=3",
    "probe.linear.batch_size=128", "probe.mlp.input=images", "probe.mlp.standardize=false", "probe.mlp.epochs=4",
    "probe.mlp.batch_size=128", "probe.mlp.dropout=0", "probe.mlp.batch_norm=false", "probe.mlp.lr=0.01",
)  # fmt: skip


def probe_on_images(rank, world_size, folder, *more):
    config = settings(folder, *ON_IMAGES, *more)
    runtime = on_cpu(rank, world_size)
    results = probe(folder, config, runtime, load_data(config, runtime))
    return results, load_probe(folder / "probes/linear").head.state_dict()


def test_a_linear_probe_on_images_that_do_not_vary_is_a_plain_loop_on_their_features_on_1_and_2_ranks(trained):
    (one,) = run_ranks(probe_on_images, 1, trained, "augment.policy=none")
    two, _ = run_ranks(probe_on_images, 2, trained, "augment.policy=none")
    chosen = one[0][0]["chosen"]["lr"]
    assert one[0][0]["chosen"] == two[0][0]["chosen"]

    config = settings(trained)
    splits = load_data(config, on_cpu(0, 1)).splits
    model, found = load_model(trained)
    features, labels = extract(
        model.encoder, splits.train, EvalTransform(**found.state["normalization"]), on_cpu(0, 1)
    )
    head = torch.nn.Linear(features.shape[1], 10)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": 1e-4}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=chosen, momentum=0.9)
    order, steps, step = TrainOrder(len(features), 128), len(features) // 128, 0
    for epoch in range(3):
        for rows in order.epoch(config.seed, epoch, 0, 1):
            for group in optimizer.param_groups:
                group["lr"] = chosen * (1 + math.cos(math.pi * step / (3 * steps - 1))) / 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
            if step == one[0][0]["chosen"]["iteration"]:
                kept = head.weight.detach().clone()
    for _, got in (one, two):
        torch.testing.assert_close(got["weight"], kept, rtol=1e-3, atol=1e-4)


def test_a_linear_probe_on_images_sees_new_views_in_every_epoch_and_leaves_the_encoder_alone(trained):
    before = {path.name: path.read_bytes() for path in trained.glob("checkpoints/*/model.safetensors")}
    (results, varied), (_, again) = (probe_on_images(0, 1, trained) for _ in range(2))
    _, fixed = probe_on_images(0, 1, trained, "augment.policy=none")
    assert torch.equal(varied["weight"], again["weight"])
    assert not torch.equal(varied["weight"], fixed["weight"])
    assert [entry["input"] for entry in results] == ["features", "features"]
    assert min(entry["test"]["accuracy"] for entry in results) > 0.2
    assert {path.name: path.read_bytes() for path in trained.glob("checkpoints/*/model.safetensors")} == before


def test_finetuning_with_a_hidden_layer_has_the_parameters_of_the_published_classifier(trained):
    config = settings(
        trained, "probe.kind=finetune", "probe.finetune.augment=false", "probe.finetune.epochs=1",
        "probe.finetune.batch_size=64", "probe.finetune.hidden=[512]",
    )  # fmt: skip
    (entry,) = probe(trained, config, on_cpu(0, 1), load_data(config, on_cpu(0, 1)))
    width = load_model(trained)[0].encoder.feature_dim
    assert entry["parameters"] == (width * 512 + 512) + 5130
    fitted = load_probe(trained / "probes/finetune")
    logits = fitted.logits(load_data(config, on_cpu(0, 1)).splits.test.stack())
    labels = load_data(config, on_cpu(0, 1)).splits.test.labels
    assert float((logits.argmax(1) == labels).double().mean()) == pytest.approx(entry["test"]["accuracy"])
