"""Keeps a run in MLflow, on the server or in the folder that MLFLOW_TRACKING_URI names.

MLflow cannot remove single points. To discard those after a step, the run is copied up to it under
a new id, and the old one is deleted, which MLflow can undo.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import PurePath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from moa_dist.observe.metrics import RunStart, SampleMetrics
from moa_dist.observe.scalars import TOKENS
from moa_dist.observe.tracker import Identity, Point

_T = TypeVar("_T")
_URI = "MLFLOW_TRACKING_URI"
_SAMPLES = "samples"
"""Folder of the texts that the model continued, a file per step."""
_AT_ONCE = 100
"""Most parameters or values in one request; MLflow takes 100 parameters."""
_LONGEST = 500
"""Most characters of a parameter that every server takes."""


class Mlflow:
    """One run of MLflow."""

    def __init__(self) -> None:
        self._started: RunStart | None = None
        self._identity: Identity | None = None
        self._client: Any = None

    def open(self, run: RunStart) -> Iterator[str]:
        """Begin a run, or continue it after `run.first_step`."""
        if not os.environ.get(_URI):
            raise ValueError(f"{_URI} is not set, so curves go nowhere")
        self._started, self._identity = run, Identity.read(run, "mlflow")
        self._client = MlflowClient()
        if self._identity.id is None:
            self._identity.set(self._create(), run.first_step)
        else:
            self._discard_after(run.first_step)
            self._client.update_run(self._known.id, status="RUNNING")
        return iter(())

    def log(self, point: Point) -> None:
        """Add a point."""
        milliseconds = int(1000 * point.time)
        metrics = [Metric(n, value, milliseconds, point.step) for n, value in point.values.items()]
        for some in _batches(metrics):
            self._client.log_batch(self._known.id, metrics=some)

    def log_samples(self, metrics: SampleMetrics) -> None:
        """Add a file of texts."""
        texts = [sample._asdict() for sample in metrics.samples]
        self._client.log_dict(self._known.id, texts, f"{_SAMPLES}/step-{metrics.step:08}.json")

    def rewind(self, step: int) -> Iterator[str]:
        """Discard all points after `step`."""
        self._discard_after(step)
        return iter(())

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._known.id)

    @property
    def _known(self) -> Identity:
        assert self._identity is not None, "open comes first"
        return self._identity

    def _create(self) -> str:
        assert self._started is not None, "open comes first"
        config, name = self._started.config, self._started.config.logging.project
        experiment = self._client.get_experiment_by_name(name)
        tags = {tag: "true" for tag in config.logging.tags}
        if self._started.provenance.commit:
            tags["mlflow.source.git.commit"] = self._started.provenance.commit
        run = self._client.create_run(
            experiment.experiment_id if experiment else self._client.create_experiment(name),
            run_name=config.name,
            tags=tags,
        )
        for some in _batches(_flat(config.model_dump(mode="json"))):
            params = [Param(name, str(value)[:_LONGEST]) for name, value in some]
            self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _discard_after(self, step: int) -> None:
        old = self._known.id
        # A crash may have come between a point and its note on disk: every point has its tokens.
        if all(m.step <= step for m in self._client.get_metric_history(old, TOKENS)):
            return
        new = self._create()
        for name in self._client.get_run(old).data.metrics:
            kept = [m for m in self._client.get_metric_history(old, name) if m.step <= step]
            for some in _batches(kept):
                self._client.log_batch(new, metrics=some)
        self._copy_samples(old, new, step)
        self._known.set(new, step)
        self._client.delete_run(old)

    def _copy_samples(self, old: str | None, new: str, last: int) -> None:
        with TemporaryDirectory() as folder:
            for file in self._client.list_artifacts(old, _SAMPLES):
                if int(PurePath(file.path).stem.removeprefix("step-")) <= last:
                    copy = self._client.download_artifacts(old, file.path, folder)
                    self._client.log_artifact(new, copy, _SAMPLES)


def _flat(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections by dotted path."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _batches(values: Iterable[_T]) -> Iterator[list[_T]]:
    """Yield the values in lists that fit in a request."""
    rest = iter(values)
    while some := list(islice(rest, _AT_ONCE)):
        yield some
