"""A run folder as an object: its settings, model, numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .. import known_names, run_folder
from ..config import Config
from ..data import EvalTransform
from ..errors import RunFolderError, printable
from ..evaluation.plots import IMAGES, PLOTS
from ..export.parts import PARTS, load_part
from ..metric_file import METRICS, read_events
from ..notebook import in_notebook, show_pictures
from ..pages.read import read_run
from ..terminal import output
from .objects import Objects, given, named_in
from .table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from .inference import Images

NUMBERS = ("train", "validation")
"""Events of metrics.jsonl that are rows of Run.metrics."""
FOLDERS = (PLOTS, IMAGES, "embeddings")
"""Of a run folder, those with pictures."""


class Run:
    """A run folder, made by `hs.pretrain` and `hs.load`.

    Everything is read when it is asked for: a run that is still training shows its newest numbers. The model is that
    of the best checkpoint of the moment of its first use, on the CPU, in eval mode and without gradients.

    Args:
        dir: the run folder.
        objects: what stands for names in its configuration that only Python knows.

    Raises:
        RunFolderError: `dir` is no run folder.
        ConfigError: its settings are not those of this version.

    Source:
        README, "Stages and the run folder".
    """

    def __init__(self, dir: str | Path, objects: Objects | None = None) -> None:
        self.dir = Path(dir)
        """The run folder."""
        run_folder.check_is_run(self.dir)
        with known_names.given({}, named_in(self.dir)):
            self.config: Config = run_folder.read_config(self.dir)
        """Its settings: `run.config.optim.lr`. What each means: `hpc-supcon config --schema`."""
        self._objects = (objects or Objects()).of_run(self.dir, self.config)
        self._parts: dict[str, Any] = {}

    @property
    def encoder(self) -> nn.Module:
        """Normalized images float32 [N, C, S, S] (see `transform`) -> features [N, encoder.feature_dim].

        Raises RunFolderError where the run has no checkpoint, CheckpointCorrupt, and ConfigError where the encoder is
        an object of Python that was not given.
        """
        return cast(nn.Module, self._part("encoder").module)

    @property
    def projection(self) -> nn.Module | None:
        """Features [N, D] -> embeddings [N, model.projection_dim], of unit length for contrastive losses; None where
        the run's loss trained none. Raises as `encoder`."""
        try:
            return cast(nn.Module, self._part("projection").module[1])
        except RunFolderError:
            self._part("encoder")  # raises where that was the reason
            return None

    @property
    def transform(self) -> nn.Module:
        """uint8 images [N, C, S, S] -> float32 images as the encoder reads them. Raises as `encoder`."""
        return EvalTransform(**self._part("encoder").description["normalization"])

    @property
    def metrics(self) -> Table:
        """A row for each logged step ("event": "train") and validation ("validation"), in the order in which they
        were written. Empty before the first; raises RunFolderError for a file that cannot be read."""
        path = self.dir / METRICS
        try:
            events = read_events(path) if path.exists() else []
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
        return Table(event for event in events if event["event"] in NUMBERS)

    @property
    def results(self) -> Table:
        """The entries of results.json, one for each probe and pruning: `row["test"]["accuracy"]` is a fraction.
        Raises RunFolderError for a damaged file."""
        return Table(run_folder.read_results(self.dir))

    @property
    def plots(self) -> dict[str, Path]:
        """Name -> PNG file of each picture of the run, such as "training", "confusion-knn", "overview"."""
        files = (path for folder in FOLDERS for path in sorted((self.dir / folder).glob("*.png")))
        return {path.stem: path for path in files}

    def show(self, *names: str) -> None:
        """Show these pictures (by default all) in a notebook; elsewhere print the paths of their files.

        Raises RunFolderError for a picture that does not exist, and where there is none.
        """
        plots = self.plots
        missing = [name for name in names if name not in plots]
        if missing or not plots:
            what = f"no picture {missing[0]!r}" if missing else "no pictures yet"
            raise RunFolderError(f"{self.dir}: {what}; there are: {', '.join(plots) or 'none'}")
        paths = [plots[name] for name in names or plots]
        if in_notebook():
            show_pictures(paths)
            return
        for path in paths:
            output().print(printable(path), soft_wrap=True)

    def embed(self, images: Images, *, part: str = "encoder", batch_size: int = 256, device: str = "auto") -> Tensor:
        """The same as `hs.embed(run, images, ...)`."""
        from .inference import embed

        return embed(self, images, part=part, batch_size=batch_size, device=device)

    def export(
        self,
        format: str,
        out: str | Path | None = None,
        *,
        part: str = "encoder",
        probe: str | None = None,
        force: bool = False,
    ) -> Path:
        """Write a part of the model to one file that other programs load, as `hpc-supcon export` does. The file is
        read back and compared with the model before it is kept. docs/guides/export.md says what each format reads.

        format: "safetensors", "torchscript", "torch-export" or "onnx" (needs hpc-supcon[export]). out: the file;
        None: NAME-PART.SUFFIX in the working directory. part: "encoder" (features), "projection" (rows of unit
        length) or "classifier" (logits) with `probe`, which of the fitted ones. force: replace a file that exists.
        Returns the path of the file.

        Raises ConfigError, RunFolderError, CheckpointCorrupt, MissingExtra and OutputError before any work;
        ExportError for a model that the format cannot represent.
        """
        from ..export import export_part

        with given(self._objects), torch.random.fork_rng(devices=[]):
            path = None if out is None else Path(out)
            return export_part(self.dir, format, part=part, probe=probe, out=path, force=force).path

    def __repr__(self) -> str:
        found = read_run(self.dir)
        last = max((event["step"] for event in found.events if event["event"] in NUMBERS), default=0)
        accuracies = {row["probe"]: row["test"]["accuracy"] for row in found.results if row.get("test")}
        scores = "".join(f", {probe} {accuracy:.4f}" for probe, accuracy in accuracies.items())
        config = self.config
        about = f"{config.model.encoder}, {config.loss.label}, {config.data.source}"
        return f"Run({str(self.dir)!r}: {about}, step {last}, {found.state}{scores})"

    def _part(self, name: str) -> Any:
        assert name in PARTS
        if name not in self._parts:
            with given(self._objects), torch.random.fork_rng(devices=[]):
                self._parts[name] = load_part(self.dir, name)
        return self._parts[name]
