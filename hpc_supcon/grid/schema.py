"""The schema of grid files and cluster profiles, and how they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from ..config import yaml12
from ..config.schema.base import Count, Section
from ..errors import ConfigError

STAGES = ("pretrain", "probe", "prune")
# Slurm's own spellings: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def minutes_of(text: object) -> object:
    """Minutes, rounded up, from a Slurm time such as "1-12", "12:30:45" or "90". Other types pass unchanged."""
    if not isinstance(text, str):
        return text
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a time; write minutes, hours:minutes:seconds or days-hours")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += 24 * int(found["days"])
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 60 + minutes + (seconds > 0)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise ValueError(f"{name!r} cannot name a folder; use at most 60 letters, digits and . _ + -")
    return name


def _checked_once(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    twice = next((value for value in values or () if (values or ()).count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice")
    return values


Name = Annotated[str, AfterValidator(_checked_name)]
SplitName = Literal["train", "validation", "test"]
ScoreName = Literal["f1", "accuracy", "precision", "recall", "mae", "mse"]
Minutes = Annotated[Count, BeforeValidator(minutes_of)]
Setting = dict[str, Any]


class Resources(Section):
    """Resources of each job of a stage. They are checked against the cluster profile before anything is submitted."""

    nodes: Count = Field(default=1, description="nodes")
    gpus: Annotated[int, Field(ge=0)] = Field(default=0, description="GPUs per node; each gets a task")
    tasks: Count | None = Field(default=None, description="ranks per node; null: one per GPU, or one")
    cpus: Count = Field(default=1, description="CPU cores per rank")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(default=None, description="memory per node, GiB")
    minutes: Minutes = Field(default=60, description="time limit; a job that reaches it is requeued")
    partition: str | None = Field(default=None, description="partition; null: the profile's")

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or max(1, self.gpus)


class ResourceRule(Section):
    """Changes of the resources of the cells that match."""

    cells: Setting = Field(min_length=1, description="axis -> value or list of values: all must match")
    pretrain: Setting = Field(default_factory=dict, description="fields of Resources to change")
    probe: Setting = Field(default_factory=dict, description="the same")
    prune: Setting = Field(default_factory=dict, description="the same")


class ResourcesConfig(Section):
    pretrain: Resources = Field(default=Resources(), description="resources of the stage")
    probe: Resources = Field(default=Resources(), description="the same")
    prune: Resources = Field(default=Resources(), description="the same")
    where: tuple[ResourceRule, ...] = Field(default=(), description="exceptions, later ones win")


class TableConfig(Section):
    """One table (and chart) of the report."""

    title: str = Field(min_length=1, description="heading; also the file's name")
    layout: Literal["scores", "matrix", "curve", "pruning"] = Field(
        description="scores: four scores for each column; matrix: accuracy; curve: matrix with numbers along "
        "the rows, drawn as lines; pruning: rate, size, ratio, accuracy, F1, and kNN and silhouette where known"
    )
    rows: str = Field(description="axis along the rows")
    columns: str | None = Field(default=None, description="axis along the columns; null: one column")
    probe: str | None = Field(default=None, description="which kind of probe; null: the first")
    splits: Annotated[tuple[SplitName, ...], AfterValidator(_checked_once)] = Field(
        default=("test",), min_length=1, description="whose scores stand beside each other in table and chart"
    )
    scores: Annotated[tuple[ScoreName, ...], AfterValidator(_checked_once)] | None = Field(
        default=None,
        min_length=1,
        description="numbers of the table, each with a chart; null: those of the layout, with a chart of accuracy. "
        "mae and mse: an autoencoder's errors, of pixels in -1..1, which are measured on validation and test",
    )


class GridConfig(Section):
    """A whole grid file."""

    name: Name = Field(description="name of the grid, also its folder")
    base: str = Field(
        description="recipe, or YAML file, that every cell starts from; {axis} in it stands for the axis's label"
    )
    set: Setting = Field(default_factory=dict, description="field -> value, in every cell")
    seeds: Count | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=1, description="a list of seeds, or their number (0, 1, ...)"
    )
    axes: dict[str, list[Any] | dict[str, Setting]] = Field(
        default_factory=dict,
        description="field -> list of values; or a free name -> {label: {field: value, ...}} for values that "
        "change several fields (`base` may be one) together",
    )
    exclude: tuple[Setting, ...] = Field(default=(), description="cells to leave out: axis -> value(s)")
    include: tuple[str | Setting, ...] = Field(
        default=(), description="more cells, each as axis or field -> value; or other grid files"
    )
    resources: ResourcesConfig = Field(default=ResourcesConfig(), description="resources of the jobs")
    pack: Count = Field(default=1, description="how many runs of one rank each share one job and its GPU")
    tables: tuple[TableConfig, ...] = Field(default=(), description="tables of the report")


class ClusterProfile(Section):
    """A cluster: launch/clusters/NAME.yaml."""

    cluster: Literal["slurm", "local", "debug"] = Field(description="where jobs run, unless --cluster says so")
    partition: str | None = Field(default=None, description="partition of jobs that name none")
    account: str | None = Field(default=None, description="account to charge")
    qos: str | None = Field(default=None, description="quality of service")
    constraint: str | None = Field(default=None, description="features that nodes must have")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(default=None, description="most GPUs of a node")
    nodes: Count | None = Field(default=None, description="most nodes a job may have")
    minutes: Minutes | None = Field(default=None, description="longest time limit a job may have")
    parallel: Count | None = Field(
        default=None,
        description="jobs of one array that run at once; null: 64, or on this machine all that have cores and GPUs",
    )
    array: Count = Field(default=1000, description="most jobs in one array (Slurm's MaxArraySize is 1001 by default)")
    max_requeues: Annotated[int, Field(ge=0)] = Field(default=20, description="how often a node may be requeued")
    signal_s: Annotated[int, Field(ge=1)] = Field(
        default=120, description="seconds between the signal to save and the time limit"
    )
    setup: tuple[str, ...] = Field(default=(), description="shell lines that each job runs first")
    python: str | None = Field(default=None, description="Python of the jobs; null: the one that submits")
    environment: dict[str, str] = Field(default_factory=dict, description="variables set in each job")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="further sbatch options, such as {reservation: night}"
    )


M = TypeVar("M", bound=BaseModel)


def read_grid(path: Path) -> GridConfig:
    """Raises ConfigError that names the file, the key and what is wrong with it."""
    return _read(path, GridConfig, "a grid")


def read_profile(path: Path) -> ClusterProfile:
    """Raises ConfigError that names the file, the key and what is wrong with it."""
    return _read(path, ClusterProfile, "a cluster profile")


def with_changes(resources: Resources, changes: Setting, where: str) -> Resources:
    """`resources` with some fields replaced. Raises ConfigError."""
    return validate({**resources.model_dump(), **changes}, Resources, where) if changes else resources


def validate(data: Any, model: type[M], where: str) -> M:
    """Plain data as a `model`. Raises ConfigError of one line."""
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise ConfigError(f"{where}: unknown key {key!r}; known at the top: {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
        raise ConfigError(f"{where}: {key}: {message[:1].lower() + message[1:]}{given}") from None


def _read(path: Path, model: type[M], kind: str) -> M:
    try:
        data = yaml12.loads(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not {kind}: must be a mapping of settings")
    return validate(data, model, str(path))
