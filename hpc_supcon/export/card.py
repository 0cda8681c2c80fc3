"""The model card: README.md with the front matter of the Hugging Face Hub, from what a run folder knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .. import __version__, run_folder
from ..config import Config, flatten, load_config
from ..errors import printable
from ..hub_names import hub_name, is_on_hub
from .model_folder import Written

HUB_DATASETS = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""data.source -> the data set's name on the Hub; others have none."""
RECIPE = ("seed", "data.", "augment.", "model.", "loss.", "optim.", "train.")
PRIVATE = ("data.root", "data.beton", "data.workers", "data.download", "model.weights")
"""Settings that say where something is on a machine."""
NO_LICENSE = (
    "None is given: without one, others may look at this model but not use it. Whoever may decide about the weights "
    "and the images they were trained on adds one with `hpc-supcon push --license NAME`."
)


def write_card(run: Path, path: Path, written: Written, *, where: str, license: str | None, page: bool) -> None:
    """Write the card of a model that goes to `where`, hf:NAME or a folder. Raises RunFolderError, OSError."""
    config = run_folder.read_config(run)
    where = where if is_on_hub(where) else "FOLDER"  # the card goes with it, wherever it is copied to
    scores = _scores(run, written.part.description["checkpoint"])
    parts = [
        "---\n" + _front_matter(config, written, scores, license) + "---\n",
        f"# {_escaped(config.name)}\n",
        _summary(config, written),
        "## Scores\n\n" + _score_table(scores),
        "## Use\n\n" + _use(written, where),
        "## Data\n\n" + _data(config, written),
        "## Recipe\n\nSettings that differ from the defaults of hpc_supcon:\n\n" + _recipe(config),
        "## Files\n\n" + _files(written, page),
        "## License\n\n" + (f"`{license}`\n" if license else NO_LICENSE + "\n"),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _scores(run: Path, checkpoint: str) -> list[dict[str, Any]]:
    """The entries of results.json about the features of this checkpoint that have test scores."""
    own = [e for e in run_folder.read_results(run) if e.get("checkpoint") == checkpoint and e.get("test")]
    of_probes = run_folder.read_scores(run).get("probes", {})
    for entry in own:
        splits = of_probes.get(entry["probe"], {}).get("splits", {})
        entry["intervals"] = {name: splits.get("test", {}).get(f"{name}_interval") for name in ("accuracy", "f1")}
    return own


def _front_matter(config: Config, written: Written, scores: list[dict[str, Any]], license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=HUB_DATASETS.get(entry["data"], printable(entry["data"])),
            dataset_name=printable(entry["data"]),
            dataset_split="test",
            metric_type=metric,
            metric_value=round(float(entry["test"][metric]), 6),
            metric_name=f"{printable(entry['probe'])} probe, {metric}",
        )
        for entry in scores
        for metric in ("accuracy", "f1")
    ]
    tags = ["hpc-supcon", "contrastive-learning", "feature-extraction"]
    source, base = HUB_DATASETS.get(config.data.source), config.model.weights
    data = ModelCardData(
        license=license,
        library_name="hpc-supcon" if written.not_timm else "timm",
        pipeline_tag="image-feature-extraction",
        tags=tags if written.not_timm else [*tags, "timm", "transformers"],
        datasets=[source] if source else None,
        base_model=hub_name("model.weights", base)[0] if base and is_on_hub(base) else None,
        metrics=["accuracy", "f1"] if results else None,
        model_name=printable(config.name),
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n") + "\n"


def _summary(config: Config, written: Written) -> str:
    channels, size, _ = written.part.shape
    width: Any = written.part.module.feature_dim
    parameters = sum(p.numel() for p in written.part.module.parameters())
    return (
        f"An encoder of images: `{config.model.encoder}`, trained with the loss `{printable(config.loss.label)}` by "
        f"hpc_supcon {__version__}. It maps {'gray' if channels == 1 else f'{channels}-channel'} images of {size} x "
        f"{size} px to {width} features; {parameters:,} parameters.\n"
    )


def _score_table(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return "None were measured: `hpc-supcon probe RUN_DIR` measures them.\n"
    rows = ["| probe | data | test accuracy | macro F1 |", "|---|---|---|---|"]
    for entry in scores:
        cells = [_with_interval(entry["test"][name], entry["intervals"][name]) for name in ("accuracy", "f1")]
        rows.append(f"| {_escaped(entry['probe'])} | {_escaped(entry['data'])} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", "In brackets: 95 % interval over the test images.", ""])


def _with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _use(written: Written, where: str) -> str:
    name = where.removeprefix("hf:")
    source = f"hf-hub:{name}" if is_on_hub(where) else f"local-dir:{name}"
    encoder = written.part.description["encoder"]
    own = f"""In hpc_supcon, as initial weights, and as a function of uint8 images [N, C, H, W]:

    hpc-supcon run RECIPE model.encoder={encoder["name"]} model.weights={where}

    from hpc_supcon.export import load_pushed
    encoder = load_pushed({where!r})  # features = encoder(images)
"""
    if written.not_timm is None:
        last = " before its last layer" if encoder["out_dim"] else ""
        return f"""In timm, whose transform prepares images as in training:

    model = timm.create_model({source!r}, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    features = model(transform(image)[None])

In transformers (features{last}):

    model = transformers.AutoModel.from_pretrained({name!r}).eval()
    features = model(pixel_values).pooler_output

{own}"""
    return f"Not in timm or transformers: {written.not_timm}.\n\n{own}{_by_hand(written)}"


def _by_hand(written: Written) -> str:
    """How timm's network with the small stem is made by hand, for the architectures where that is two lines."""
    encoder, module = written.part.description["encoder"], written.part.module
    if written.part.module.stem_kind != "small" or encoder.get("channels") or encoder["input_size"]:
        return ""
    for first, pool in (("conv1", "maxpool"), ("features.conv0", "features.pool0")):
        try:
            conv: Any = module.get_submodule(first)
            module.get_submodule(pool)
        except AttributeError:
            continue
        if not hasattr(conv, "kernel_size"):
            return ""
        arguments = f"{conv.in_channels}, {conv.out_channels}, 3, 1, 1, bias=False"
        return f"""
With timm's layers, two of which are replaced:

    model = timm.create_model({encoder["name"]!r}, num_classes={encoder["out_dim"] or 0}).eval()
    model.{first} = torch.nn.Conv2d({arguments})
    model.{pool} = torch.nn.Identity()
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
"""
    return ""


def _data(config: Config, written: Written) -> str:
    description = written.part.description
    encoder = description["encoder"]
    classes, normalization = description["classes"], description["normalization"]
    numbers = ", ".join(f"{name} [{', '.join(f'{v:.4f}' for v in normalization[name])}]" for name in ("mean", "std"))
    labels = f"{len(classes)} classes" if classes else "no labels"
    return (
        f"`{config.data.source}`, {labels}. Images are scaled to 0..1, then normalized by {numbers}; larger ones are "
        f"resized (bilinear) by their shorter side, and the central square is taken.{_inner_size(encoder)}\n"
    )


def _inner_size(encoder: dict[str, Any]) -> str:
    if encoder["input_size"] in (None, encoder["image_size"]):
        return ""
    return (
        f" Inside hpc_supcon, the encoder resizes its input of {encoder['image_size']} px to {encoder['input_size']} "
        "px, which other programs have to give it."
    )


def _recipe(config: Config) -> str:
    """An indented block: text of a user's in it stays text."""
    own, defaults = flatten(config), flatten(load_config())
    chosen = {
        key: value
        for key, value in own.items()
        if value != defaults.get(key) and key.startswith(RECIPE) and key not in PRIVATE
    }
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in chosen.items()]
    return "\n".join(f"    {printable(line)}" for line in lines or ["(none)"]) + "\n"


def _files(written: Written, page: bool) -> str:
    files = {
        "model.safetensors": "the encoder",
        "config.json": "how it is built" if written.not_timm else "how it is built, for timm and hpc_supcon",
    }
    if written.has_projection:
        files["projection.safetensors"] = 'the projection: `load_pushed(..., "projection")`'
    for kind in written.probes:
        files[f"probe-{kind}.safetensors"] = f'a fitted probe: `load_pushed(..., "classifier", "{kind}")`'
    if page:
        files["report.html"] = "the page of the run: [report.html](report.html)"
    return "".join(f"- `{name}`: {what}\n" for name, what in files.items())


def _escaped(text: object) -> str:
    """Text of a user's on one line, without what Markdown or HTML would read in it."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&])", r"\\\1", printable(text))
