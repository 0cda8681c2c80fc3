"""Optional packages: who is told that one is missing is told what installs it."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Callable, Iterable
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

from hpc_supcon import errors
from hpc_supcon.bench import doctor
from hpc_supcon.bench.loss_contenders import contender
from hpc_supcon.config import load_config
from hpc_supcon.data.loaders import dali, ffcv
from hpc_supcon.data.sources.huggingface import open_huggingface
from hpc_supcon.data.sources.tar_shards import open_shards
from hpc_supcon.data.sources.tiff_file import read_tiff
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import MissingExtra
from hpc_supcon.evaluation import maps, predictions
from hpc_supcon.export.exporter import export_part
from hpc_supcon.export.formats import FORMATS
from hpc_supcon.losses import SupConLoss, gathered
from hpc_supcon.models import hub, lora
from hpc_supcon.tracking import check_trackers
from hpc_supcon.training.engine.checks import check_engine

PACKAGE = Path(errors.__file__).parent
SETUP = ConfigParser(interpolation=None)
SETUP.read(PACKAGE.parent / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]
COLUMNS = {"columns": None, "image_size": None, "channels": None}


def distributions(extra: str) -> set[str]:
    """The names of what an extra installs, with those of the extras that it has in it."""
    found: set[str] = set()
    for requirement in map(Requirement, EXTRAS[extra].split()):
        if requirement.name == "hpc-supcon":
            found = found.union(*map(distributions, requirement.extras))
        else:
            found.add(requirement.name)
    return found


def deepspeed() -> None:
    check_engine(load_config("default", ["train.engine=deepspeed"]), Runtime(Launch(), torch.device("cpu")))


def write_tiffs(folder: Path) -> None:
    """Of five bands, which tifffile reads and Pillow does not; and one that says that it is compressed (LZW)."""
    for name in ("bands.tif", "lzw.tif"):
        tifffile.imwrite(folder / name, np.zeros((8, 8, 5), np.uint8), planarconfig="contig")
    with tifffile.TiffFile(folder / "lzw.tif", mode="r+b") as file:
        file.pages.first.tags["Compression"].overwrite(5)


def same_package(names: Iterable[str], others: Iterable[str]) -> bool:
    """Whether one is in both; of huggingface_hub and huggingface-hub each is written in some versions."""
    return bool({*map(canonicalize_name, names)} & {*map(canonicalize_name, others)})


# name of the test -> (module, the distribution that has it, what needs it)
MISSING: dict[str, tuple[str, str, Callable[[], object]]] = {
    "ffcv": ("ffcv", "ffcv", ffcv._libffcv),
    "dali": ("nvidia.dali", "nvidia-dali-cuda130", dali._import_dali),
    "deepspeed": ("deepspeed", "deepspeed", deepspeed),
    "umap": ("umap", "umap-learn", lambda: maps.missing_packages(["umap"])),
    "openTSNE": ("openTSNE", "openTSNE", lambda: maps.missing_packages(["tsne"])),
    "pml": ("pytorch_metric_learning", "pytorch-metric-learning", lambda: contender("pml")),
    "wandb": ("wandb", "wandb", lambda: check_trackers(["wandb"])),
    "mlflow": ("mlflow", "mlflow-skinny", lambda: check_trackers(["mlflow"])),
    "datasets": ("datasets", "datasets", lambda: open_huggingface("x", **COLUMNS)),
    "webdataset": ("webdataset", "webdataset", lambda: open_shards("x", **COLUMNS)),
    "tifffile": ("tifffile", "tifffile", lambda: read_tiff(Path("bands.tif"), 5)),
    "imagecodecs": ("imagecodecs", "imagecodecs", lambda: read_tiff(Path("lzw.tif"), 5)),
    "peft": ("peft", "peft", lambda: lora.merge_adapters(nn.Linear(1, 1))),
    "hub": ("huggingface_hub", "huggingface_hub", hub.check_hub),
    "pyarrow": ("pyarrow", "pyarrow", predictions._pyarrow_parquet),
    "triton": ("triton", "triton", lambda: SupConLoss(0.1, backend="triton")(torch.eye(2), torch.zeros(2).long())),
    **{
        f"onnx: {module}": (module, module, lambda: export_part(Path("x"), "onnx"))
        for module in FORMATS["onnx"].needs
    },
}  # fmt: skip

NO_EXTRA = {"triton", "imagecodecs"}
"""PyTorch's own, for its builds that have it; and decoders in C for many formats, which a user chooses knowingly."""


def hide(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module be one that is not installed."""
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    gathered.has_triton.cache_clear()


def provoked(name: str, folder: Path) -> tuple[str, Path, int]:
    """(message, file, line) of the MissingExtra of a row of MISSING."""
    module, _, needs = MISSING[name]
    made: list[tuple[str, Path, int]] = []
    write_tiffs(folder)

    def record(error: MissingExtra, message: str) -> None:
        frame = sys._getframe(1)
        made.append((message, Path(frame.f_code.co_filename), frame.f_lineno))
        errors.HpcSupconError.__init__(error, message)

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.suppress(MissingExtra):
        monkeypatch.setattr(MissingExtra, "__init__", record)
        monkeypatch.chdir(folder)
        hide(module, monkeypatch)
        needs()
    gathered.has_triton.cache_clear()
    [only] = made
    return only


@pytest.mark.parametrize("name", MISSING)
def test_the_extra_that_is_named_has_the_package_that_is_missing(name, tmp_path):
    message, _, _ = provoked(name, tmp_path)
    module, distribution, _ = MISSING[name]
    assert same_package([distribution], packages_distributions().get(module, [distribution]))
    base = {Requirement(line).name: line for line in SETUP["options"]["install_requires"].split()}
    install = message.partition("pip install ")[2]
    if distribution in base:
        assert install in (distribution, f"'{base[distribution]}'")
    elif distribution in NO_EXTRA:
        assert install == distribution
        assert not any(distribution in distributions(extra) for extra in EXTRAS)
    else:
        [extra] = re.findall(r"^'hpc-supcon\[(\w+)\]'", install)
        assert distribution in distributions(extra)


def test_every_place_that_tells_of_a_missing_package_is_one_of_these(tmp_path):
    told = [provoked(name, tmp_path)[1:] for name in MISSING]
    calls = [
        (path, node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingExtra"
    ]
    assert len(calls) > 10
    for path, node in calls:
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        assert any(file == path and line in lines for file, line in told), f"{path}:{node.lineno}"


def test_the_doctor_knows_the_modules_of_every_extra():
    """`dev` is for those who change the package, and `report` is other extras together."""
    assert set(doctor.EXTRAS) == set(EXTRAS) - {"dev", "report"}
    for extra, (module, _) in doctor.EXTRAS.items():
        [top, *_] = module.split(".")
        found = packages_distributions().get(top, [])
        assert not found or top == "nvidia" or same_package(distributions(extra), found), extra


def test_developers_have_every_extra_but_those_that_need_a_compiler_a_gpu_or_an_account():
    script = (PACKAGE.parent / "tests/loaders/install-extras.sh").read_text()
    later = {extra for found in re.findall(r"-e '\.\[([\w,]+)\]'", script) for extra in found.split(",")}
    assert later == {"ffcv", "dali", "deepspeed", "wandb", "mlflow"}
    for extra in set(EXTRAS) - later:
        assert distributions(extra) <= distributions("dev"), extra


def test_the_documentation_lists_every_extra():
    page = (PACKAGE.parent / "docs/index.md").read_text()
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert {extra for row in rows for extra in re.findall(r"`([\w]+)`", row.split("|")[1])} == set(EXTRAS)


def test_every_lower_bound_is_told():
    every = SETUP["options"]["install_requires"].split() + " ".join(EXTRAS.values()).split()
    assert [r.name for r in map(Requirement, every) if not r.specifier and r.name != "hpc-supcon"] == []
