"""The stages as functions: what the commands of the same names do, with Python objects where they have texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import parts
from ..config import Config, load_config
from ..distributed.collectives import propagate_errors
from ..distributed.resolve import resolve
from ..errors import ConfigError
from ..evaluation.encoder import check_has_encoder
from ..evaluation.probes import check_probes
from ..pages.page import check_page_output, render, write_page
from ..pages.runs import PAGE, page_of_runs
from ..run_folder import read_config
from ..stages.pretrain_run import pretrain_and_draw
from ..stages.probe import probe as probe_stage
from ..stages.probe_settings import settings_of_probe
from ..stages.prune import check_prune
from ..stages.prune import prune as prune_stage
from ..stages.results import ResultWriter
from ..stages.start import refused_together
from ..training.callbacks import Callback
from .objects import EncoderObject, LossObject, Objects, SourceObject, given
from .run import Run
from .session import running
from .settings import Settings, overrides_of, recipe_of
from .table import Table


def pretrain(
    config: str | Path | Settings | Config = "quickstart",
    *,
    run_dir: str | Path | None = None,
    settings: Settings | None = None,
    source: SourceObject | None = None,
    encoder: EncoderObject | None = None,
    loss: LossObject | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> Run:
    """Pre-train an encoder into a run folder, as `hpc-supcon pretrain` does.

    In one process, or under torchrun or srun, where every rank calls this with the same arguments. Ctrl-C, or the
    stop button of a notebook, saves after the step under way and raises KeyboardInterrupt; go on with `resume=True`.
    Afterwards random generators, threads and signal handlers are as before, and there is no process group. SIGTERM
    saves and raises Preempted, or ends the process where it is not training.

    Args:
        config: the name of a recipe, a YAML file, settings over the defaults (`{"data.source": "digits"}`, with
            "base" for a recipe to start from), or a Config.
        run_dir: the run folder; None: as `config` says, by default runs/NAME. A used one is refused without
            `resume`.
        settings: further settings, `{"optim.lr": 0.1}` or `{"optim": {"lr": 0.1}}`.
        source: images in place of `data.source`: (train, test) or {"train": ..., "test": ..., "validation": ...}
            of map-style torch Datasets, whose items are (image, label) with uint8 pixels or PIL images; one Dataset
            alone with `data.labels="none"`.
        encoder: in place of `model.encoder`: a module with the attribute feature_dim, images float [N, C, S, S] ->
            features [N, feature_dim], of which a copy is trained; or what makes one, called with those of
            in_channels, image_size (pixels) and out_dim that it takes.
        loss: in place of `loss.name`: a module, its class or a function: (embeddings [N, V, D] of unit length, of V
            views of the N images of all ranks, labels int64 [N]) -> the loss of the batch, 0-dim. The gradient over
            ranks is that of one process.
        callbacks: called during training, see Callback.
        resume: go on from the newest checkpoint of the run folder, bit for bit where `deterministic` is set.

    Returns:
        The run.

    Raises:
        ConfigError: a setting or an object is wrong; nothing was done.
        DataError: the images are missing, damaged or of another form.
        RunFolderError: the run folder is used, or in use.
        CallbackError: a callback raised an exception.
        NonFinite: loss or gradients became NaN or Inf.
        Preempted: SIGTERM or SIGUSR2 came; the run has saved.
        HpcSupconError: every other error with a name, see `hpc_supcon.errors`.

    Source:
        SupCon: Khosla et al. 2020 (arXiv 2004.11362); every loss names its own.
    """
    objects = Objects(source, encoder, loss)
    with given(objects):
        with refused_together():
            recipe, changes = recipe_of(config)
            changes += overrides_of({} if run_dir is None else {"run_dir": str(run_dir)})
            changes += [*overrides_of(settings), *objects.overrides()]
            resolved = load_config(recipe, changes, stages=("pretrain",))
        with running("pretrain", resolved, ("pretrain",), {"resume": resume}, resume=resume) as (runtime, data):
            writer = ResultWriter()
            folder = pretrain_and_draw(
                resolved, runtime, data, resume=resume, writer=writer, callbacks=tuple(callbacks)
            )
            writer.check()
        return Run(folder, objects)


def load(
    run_dir: str | Path,
    *,
    source: SourceObject | None = None,
    encoder: EncoderObject | None = None,
    loss: LossObject | None = None,
    allow_code: Sequence[str] = (),
) -> Run:
    """Open a run folder. Executes nothing that the folder names.

    Args:
        run_dir: the run folder.
        source, encoder, loss: the objects that it was trained with, where there were any: a folder has only their
            names. Without them its numbers and pictures can be read, and what needs an object asks for it.
        allow_code: import paths in its settings, "package.module:name", that may be imported instead.

    Returns:
        The run.

    Raises:
        RunFolderError: no run folder.
        ConfigError: settings of another version; an object in place of a part of this package.

    Source:
        README, "Stages and the run folder".
    """
    parts.allow(allow_code, "allow_code")
    return Run(run_dir, Objects(source, encoder, loss))


def probe(
    run: Run | str | Path,
    kind: str | Sequence[str] | None = None,
    *,
    source: SourceObject | None = None,
    settings: Settings | None = None,
) -> Table:
    """Evaluate the encoder of a run by probes, as `hpc-supcon probe` does. Under torchrun all ranks call this.

    Args:
        run: a run or its folder.
        kind: "linear", "mlp", "knn", "finetune", "softmax", "logistic", or several; None: as the run's settings say.
        source: other images than the run's own, as of `hs.pretrain`; results are filed under their name.
        settings: further settings, such as `{"probe.knn.k": 5}` or `{"data.source": "mnist", "data.root": FOLDER}`.

    Returns:
        The new entries of results.json, a row for each probe: "probe", "chosen", and "train", "validation", "test"
        with "accuracy", "f1", "precision" and "recall" (fractions; macro averages over classes).

    Raises:
        ConfigError, DataError, RunFolderError, CheckpointCorrupt: before any fit.
        NonFinite: a fit did not stay finite.
        ResultsNotWritten: the disk is full; the results were printed.

    Source:
        Linear evaluation: Chen et al. 2020 (arXiv 2002.05709); weighted kNN: Wu et al. 2018 (arXiv 1805.01978).
    """
    run = run if isinstance(run, Run) else Run(run)
    other = Objects(source)
    kinds = {} if kind is None else {"probe.kind": kind if isinstance(kind, str) else list(kind)}
    overrides = [*overrides_of(kinds), *overrides_of(settings), *other.overrides()]
    with given(run._objects), given(other):
        with refused_together():
            config, of_run = settings_of_probe(run.dir, overrides)
        command = {"run": run.dir.absolute()}
        with running("probe", config, ("probe",), command, folder=run.dir, of_run=of_run) as (runtime, data):
            with propagate_errors():
                check_probes(config, data.splits)
            writer = ResultWriter()
            results = probe_stage(run.dir, config, runtime, data, writer=writer, is_other=of_run is not None)
            writer.check()
    return Table(results)


def prune(run: Run | str | Path, *, settings: Settings | None = None, resume: bool = False) -> Table:
    """Prune the encoder of a run to each rate of `prune.rate`, fine-tune it, probe it and measure its size, as
    `hpc-supcon prune` does. Under torchrun all ranks call this.

    Args:
        run: a run or its folder. Each pruned encoder gets a run folder in its "pruned".
        settings: such as `{"prune.rate": [0.5, 0.9], "prune.method": "lamp"}`; rates are shares of the weights, 0..1.
        resume: go on with prunings that were started before.

    Returns:
        The new entries of results.json, a row for each rate and probe: "folder", "prune", "size" (bytes), "cost", and
        the scores as of `hs.probe`.

    Raises:
        ConfigError, DataError, RunFolderError, CheckpointCorrupt: before any work.
        PruningError: an encoder is not what was asked for.
        NonFinite, Preempted, ResultsNotWritten: as of `hs.pretrain` and `hs.probe`.

    Source:
        Each method names its own, see `prune.method` in `hpc-supcon config --schema`.
    """
    run = run if isinstance(run, Run) else Run(run)
    with given(run._objects):
        with refused_together():
            config = read_config(run.dir, overrides_of(settings), stages=("prune",))
            check_prune(run.dir, config, resume=resume)
            check_has_encoder(run.dir)
        command = {"run": run.dir.absolute(), "resume": resume}
        with running("prune", config, ("prune",), command, folder=run.dir) as (runtime, data):
            writer = ResultWriter()
            results = prune_stage(run.dir, config, runtime, data, resume=resume, writer=writer)
            writer.check()
    return Table(results)


def report(*runs: Run | str | Path, out: str | Path | None = None) -> Path:
    """Write all that is known of one run, or of several beside each other, into one HTML page, as `hpc-supcon report`
    does.

    Args:
        runs: runs or their folders, at least one.
        out: the page; None: report.html in the run folder, of several runs in the working directory. Under torchrun
            rank 0 alone writes it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: no run.
        RunFolderError: no run folder, or one that is given twice.
        OutputError: a file that is no such page is there, or it cannot be written.

    Source:
        README, "The page of a run".
    """
    if not runs:
        raise ConfigError("which run? hs.report(run), or several: hs.report(run_a, run_b)")
    folders = [run.dir if isinstance(run, Run) else Path(run) for run in runs]
    path = Path(out) if out is not None else folders[0] / PAGE if len(folders) == 1 else Path(PAGE)
    if resolve().rank == 0:
        page = page_of_runs(folders)
        check_page_output(path)
        write_page(path, render(page))
    return path
