"""A run's record at MLflow: the server of MLFLOW_TRACKING_URI, or the files RUN_DIR/mlruns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, flatten
from ..terminal import note
from .record import Row, Tell, entry_name, flat
from .state import State

EXPERIMENT = "hpc-supcon"
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Of one call."""
MAX_TEXT = 5000
# without these, a server that does not answer is waited for an hour
LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class MlflowRun:
    """Steps are those of metrics.jsonl, times those at which the events were written."""

    def __init__(self, folder: Path, config: Config, state: State, tell: Tell) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (folder.absolute() / "mlruns").as_uri()
        # MLflow asks for this: its files get no new features any more
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        if state.id is None or state.at != uri or not self._exists(state.id):
            created = self._client.create_run(self._experiment(), run_name=config.name)
            state.begin(created.info.run_id, uri)
            note(f"mlflow: run {state.id} at {uri}")
        assert state.id is not None
        self._id = state.id
        self._client.update_run(self._id, status="RUNNING")
        self._configure(config)

    def _exists(self, id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _configure(self, config: Config) -> None:
        """Settings as parameters. MLflow keeps the first value of each; the file config.yaml has the present one."""
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        params = [Param(name, str(value)[:MAX_TEXT]) for name, value in flatten(config).items() if name not in known]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MAX_PARAMS])

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, int(1000 * row.time), row.step) for row in rows for name, value in row.numbers.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_METRICS])
        texts = {name: text[:MAX_TEXT] for row in rows for name, text in row.texts.items()}
        if texts:
            self._client.log_batch(self._id, tags=[RunTag(name, text) for name, text in texts.items()])

    def results(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The last value of each number; the table is the file results.json."""
        for entry in entries:
            for name, value in flat(entry):
                if isinstance(value, (int, float)):
                    self._client.log_metric(self._id, f"results/{entry_name(entry)}/{name}", float(value))

    def file(self, kind: str, name: str, path: Path) -> None:
        if kind == "checkpoint":
            self._client.log_artifacts(self._id, str(path), name)
        else:
            parent = str(Path(name).parent)
            self._client.log_artifact(self._id, str(path), None if parent == "." else parent)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
