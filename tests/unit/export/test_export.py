"""`export`: files of every format give the model's outputs, timm loads the weights, and mistakes are errors."""

from __future__ import annotations

import json
from dataclasses import replace

import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hpc_supcon.models
from hpc_supcon import checkpoint, cli, run_folder
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError, ExportError, MissingExtra, OutputError, RunFolderError
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe, save_probe
from hpc_supcon.export import export_part, exporter, load_part
from hpc_supcon.export.formats import FORMATS, METADATA
from hpc_supcon.training.build import describe_model
from hpc_supcon.training.data import load_data

FAST = [
    "report.embeddings=false",
    "data.batch_size=256", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.epochs=1", "log.tensorboard=false", "runtime.threads=1", "probe.linear.epochs=2",
    "probe.linear.lrs=[1e-2]", "probe.softmax.iterations=10", "probe.mlp.epochs=1", "probe.mlp.hidden=[16]",
    "probe.logistic.iterations=10", "probe.logistic.classes=[3, 1]", "probe.knn.k=5", "probe.finetune.epochs=1",
    "probe.finetune.lr=0.1", "probe.finetune.encoder_lr=0.01",
]  # fmt: skip
KINDS = ("linear", "softmax", "logistic", "mlp", "knn", "finetune")
EVERY = ["encoder", "projection", *KINDS]
SLOW = ["projection", "linear", "knn", "softmax"]  # one of each structure: these formats take seconds each
CASES = [(f, p) for f in ("safetensors", "torchscript") for p in EVERY]
CASES += [(f, p) for f in ("torch-export", "onnx") for p in SLOW]


def quiet(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    return stopped.value.code or 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the digits (8x8, gray) with every kind of probe."""
    folder = tmp_path_factory.mktemp("trained") / "digits-run"
    assert quiet("run", "default", *FAST, f"probe.kind=[{', '.join(KINDS)}]", f"run_dir={folder}") == 0
    return folder


def untrained(folder, *overrides):
    """A run folder with one checkpoint of random weights and random BatchNorm statistics."""
    synthetic = "data.synthetic={images: 24, classes: 3, channels: 3, image_size: 32}"
    config = load_config("default", ["data.source=synthetic", synthetic, f"run_dir={folder}", *overrides])
    data = load_data(config, Runtime(Launch(), torch.device("cpu")))
    description = describe_model(config, data.splits)
    model = hpc_supcon.models.build_model(description)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    run_folder.create(folder, config)
    checkpoint.save_checkpoint(
        folder / "checkpoints", 3, {"model": model.state_dict()}, description, world_size=1, config_digest="d"
    )
    return folder


def images_of(n, *shape):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def reference(folder, part, images):
    """What evaluation computes, by its own modules."""
    if part not in KINDS:
        model, found = load_model(folder)
        features = model.eval().encoder(EvalTransform(**found.state["normalization"])(images))
        return features if part == "encoder" else model.heads["projection"](features)
    probe = load_probe(folder / "probes" / part)
    return probe.logits(reference(folder, "encoder", images) if probe.input == "features" else images)


def read(format, path):
    """(function of pixels in 0..1, metadata), by the runtime of the format."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = [entry.name for entry in session.get_inputs()]
        assert (name, session.get_inputs()[0].shape) == ("images", ["batch", 1, 8, 8])
        (output,) = session.get_outputs()
        assert output.shape[0] == "batch"
        metadata = session.get_modelmeta().custom_metadata_map
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), metadata
    if format == "safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return FORMATS[format].read(path), metadata
    extra = {METADATA: ""}
    if format == "torchscript":
        with pytest.warns(match=r"torch\.jit"):
            return torch.jit.load(path, _extra_files=extra), json.loads(extra[METADATA])
    module = torch.export.load(path, extra_files=extra).module()
    return module, json.loads(extra[METADATA])


@pytest.mark.parametrize(("format", "part"), CASES)
def test_the_file_gives_the_outputs_of_the_model_for_batches_of_any_size(trained, tmp_path, format, part):
    probe = part if part in KINDS else None
    written = export_part(
        trained, format, part="classifier" if probe else part, probe=probe, out=tmp_path / "model.file"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model.file"]
    assert written.bytes == written.path.stat().st_size
    function, metadata = read(format, written.path)
    assert metadata["part"] == ("classifier" if probe else part)
    for n in (1, 2, 7):
        images = images_of(n, 1, 8, 8)
        with torch.no_grad():
            got = function(images.float() / 255)
        torch.testing.assert_close(got, reference(trained, part, images), rtol=1e-4, atol=1e-4)
    assert json.loads(metadata["classes"]) == (["3", "1"] if probe == "logistic" else list("0123456789"))


def test_weights_are_for_normalized_images_and_load_without_the_run(trained, tmp_path):
    path = export_part(trained, "safetensors", out=tmp_path / "encoder.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "timm" not in metadata
    encoder = eval(metadata["rebuild"], {"hpc_supcon": hpc_supcon})
    encoder.load_state_dict(load_file(path), strict=True)
    images, statistics = images_of(4, 1, 8, 8), json.loads(metadata["normalization"])
    normalized = (images.float() / 255 - statistics["mean"][0]) / statistics["std"][0]
    torch.testing.assert_close(encoder.eval()(normalized), reference(trained, "encoder", images))


@pytest.mark.parametrize(
    ("overrides", "loads_in_timm"),
    [
        (["model.encoder=resnet18", "model.stem=standard"], True),
        (["model.encoder=resnet18", "model.stem=small"], False),
        (
            ["model.encoder=resnet18d", "model.stem=small"],
            False,
        ),  # only strides differ: timm would load it, wrongly
        (["model.encoder=resnet18", "model.stem=standard", "model.out_dim=5"], True),
        (["model.encoder=vit_tiny_patch16_224"], True),
        (["model.encoder=conv", "model.input_size=20"], False),
    ],
)
def test_timm_loads_all_weights_if_the_architecture_is_its_own(tmp_path, overrides, loads_in_timm):
    folder = untrained(tmp_path / "run", *overrides)
    path = export_part(folder, "safetensors", out=tmp_path / "e.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert ("timm" in metadata) == loads_in_timm
    images = images_of(2, 3, 32, 32)
    wanted, transform = reference(folder, "encoder", images), EvalTransform(**json.loads(metadata["normalization"]))
    for expression in (metadata[key] for key in ("rebuild", "timm") if key in metadata):
        model = eval(expression, {"hpc_supcon": hpc_supcon, "timm": timm})
        model.load_state_dict(load_file(path), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(transform(images)), wanted)


def test_resizing_inside_the_encoder_is_part_of_a_graph(tmp_path):
    folder = untrained(tmp_path / "run", "model.encoder=conv", "model.input_size=20")
    path = export_part(folder, "torchscript", out=tmp_path / "e.pt").path
    images = images_of(3, 3, 32, 32)
    got = read("torchscript", path)[0](images.float() / 255)
    torch.testing.assert_close(got, reference(folder, "encoder", images), rtol=1e-4, atol=1e-5)


def perturbed(part, metadata):
    for tensor in part.module.state_dict().values():
        tensor.add_(0.01 if tensor.is_floating_point() else 0)
    return FORMATS["safetensors"].to_bytes(part, metadata)


def not_a_number(part, metadata):
    next(iter(part.module.state_dict().values())).fill_(float("nan"))
    return FORMATS["safetensors"].to_bytes(part, metadata)


@pytest.mark.parametrize("broken", [perturbed, not_a_number, lambda part, metadata: b"not a model"])
def test_a_file_with_other_outputs_is_an_error_and_an_earlier_file_stays(trained, tmp_path, monkeypatch, broken):
    whole = FORMATS["safetensors"]

    def on_a_copy(part, metadata):
        return broken(load_part(trained, part.name), metadata)

    monkeypatch.setitem(exporter.FORMATS, "bad", replace(whole, to_bytes=on_a_copy))
    out = tmp_path / "e.safetensors"
    for before in ([], [out.name]):
        with pytest.raises(ExportError, match="not kept"):
            export_part(trained, "bad", out=out, force=True)
        assert [p.name for p in tmp_path.iterdir()] == before
        out.write_text("earlier")
    assert out.read_text() == "earlier"


def test_a_model_that_a_format_cannot_trace_is_an_error(trained, tmp_path, monkeypatch):
    def branch(part, metadata):
        raise RuntimeError("step 2 of 3 failed. Next steps:") from ValueError(
            "\x1b[96mdata-dependent\x1b[0m branch\nmore"
        )

    monkeypatch.setitem(exporter.FORMATS, "torch-export", replace(FORMATS["torch-export"], to_bytes=branch))
    with pytest.raises(ExportError, match="cannot represent this encoder: data-dependent branch; try another"):
        export_part(trained, "torch-export", out=tmp_path / "e.pt2")
    assert not list(tmp_path.iterdir())


def test_a_probe_of_another_checkpoint_is_an_error(trained, tmp_path):
    folder = untrained(tmp_path / "run", "model.encoder=conv")
    with pytest.raises(RunFolderError, match="no fitted probe in it; run `hpc-supcon probe"):
        load_part(folder, "classifier")
    with pytest.raises(RunFolderError, match=r"no fitted knn probe in it \(none saved\).*probe.kind=knn"):
        load_part(folder, "classifier", "knn")
    fitted = load_probe(trained / "probes/linear")
    save_probe(fitted, folder / "probes/linear", 2, world_size=1, config_digest="d")
    with pytest.raises(RunFolderError, match="fitted on step 2, but the best checkpoint is step 3: run"):
        load_part(folder, "classifier")


def test_mistakes_are_found_before_any_work(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--format: unknown format 'onx'; did you mean 'onnx'"):
        export_part(trained, "onx", out=out)
    with pytest.raises(ConfigError, match="--part: unknown part 'encodr'; did you mean 'encoder'"):
        export_part(trained, "onnx", part="encodr", out=out)
    with pytest.raises(ConfigError, match="--probe=knn goes with --part classifier, not with encoder"):
        export_part(trained, "onnx", probe="knn", out=out)
    with pytest.raises(ConfigError, match="several fitted probes; choose one with --probe: linear, softmax"):
        export_part(trained, "onnx", part="classifier", out=out)
    with pytest.raises(ConfigError, match="unknown probe 'knm'; did you mean 'knn'"):
        export_part(trained, "onnx", part="classifier", probe="knm", out=out)
    with pytest.raises(RunFolderError, match="not a run folder"):
        export_part(tmp_path, "onnx", out=out)
    with pytest.raises(OutputError, match="does not exist: make the folder first"):
        export_part(trained, "onnx", out=tmp_path / "no" / "x.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        export_part(trained, "onnx", out=tmp_path)
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtra, match=r"needs onnxscript: pip install 'hpc-supcon\[export\]'"):
        export_part(trained, "onnx", out=out)
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoint_or_projection_is_an_error(tmp_path):
    folder = untrained(tmp_path / "run", "model.encoder=conv", "loss.name=cross_entropy")
    with pytest.raises(RunFolderError, match="trained no projection"):
        load_part(folder, "projection")
    for file in (folder / "checkpoints/step-3").iterdir():
        file.unlink()
    (folder / "checkpoints/step-3").rmdir()
    with pytest.raises(RunFolderError, match="no encoder in this run"):
        load_part(folder, "encoder")


def test_the_file_is_named_after_the_run_and_replaced_only_with_force(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ("export", trained, "--format", "safetensors")
    assert quiet(*command) == 0
    assert capsys.readouterr().out.startswith("digits-run-encoder.safetensors: ")
    before = {k: t.clone() for k, t in load_file(tmp_path / "digits-run-encoder.safetensors").items()}  # mapped
    (tmp_path / "digits-run-encoder.safetensors").write_bytes(b"older")
    assert quiet(*command) == 2
    assert "exists already; choose another name with -o, or replace it with --force" in capsys.readouterr().err
    assert quiet(*command, "--force") == 0
    after = load_file(tmp_path / "digits-run-encoder.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.name for p in tmp_path.iterdir()] == ["digits-run-encoder.safetensors"]
