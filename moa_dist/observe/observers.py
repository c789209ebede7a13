"""Combines all observers of a run into one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch

from moa_dist.checkpoint.write import describe_write_error
from moa_dist.config.run import Config
from moa_dist.observe.console import Console
from moa_dist.observe.gpu import GpuTelemetry
from moa_dist.observe.jsonl import MetricsFile
from moa_dist.observe.metrics import (
    Observer,
    RunStart,
    SampleMetrics,
    StepMetrics,
    ValidationMetrics,
)
from moa_dist.observe.tracker import Tracker


class Observers:
    """Forwards every report to the console, the metrics file and the configured trackers.

    If one of them cannot write, for example on a full disk, its lines are lost and training
    continues; whether training may continue without checkpoints is up to `checkpoint.on_failure`.
    Every rank may create one, since nothing is opened before `start`; only rank 0 uses it.
    """

    def __init__(self, config: Config) -> None:
        self._names = config.logging.trackers
        self._trackers: list[Tracker] = []
        self._listeners: list[Observer] = [Console(), MetricsFile()]
        self._gpu: GpuTelemetry | None = None
        self._closing = ExitStack()
        self._failed: set[str] = set()

    def start(self, run: RunStart) -> None:
        """Start all observers. The rank's device must be torch's current one."""
        on_gpu = run.device.startswith("cuda")
        self._gpu = GpuTelemetry(
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        self._closing.callback(self._gpu.close)
        # Imported here because each takes a second or more, and two are optional.
        if "tensorboard" in self._names:
            from moa_dist.observe.tensorboard import TensorBoard

            self._listeners.append(TensorBoard())
        if "wandb" in self._names:
            from moa_dist.observe.wandb import Wandb

            self._trackers.append(Tracker("wandb", Wandb()))
        if "mlflow" in self._names:
            from moa_dist.observe.mlflow import Mlflow

            self._trackers.append(Tracker("MLflow", Mlflow()))
        for listener in self._listeners:
            self._closing.callback(self._try, listener, listener.close)
            listener.start(run)
        for tracker in self._trackers:
            self._closing.callback(self._forward_notes)  # of closing, after it
            self._closing.callback(tracker.close)
            tracker.start(run)
        self._listeners += self._trackers
        if self._gpu.reason:
            self.note(self._gpu.reason)

    def step(self, metrics: StepMetrics) -> None:
        """Report a step to all observers, with the GPU's readings."""
        assert self._gpu is not None, "start comes first"
        metrics = replace(metrics, gpu=self._gpu.read())
        self._each(lambda listener: listener.step(metrics))
        self._forward_notes()

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation pass to all observers."""
        self._each(lambda listener: listener.validation(metrics))

    def samples(self, metrics: SampleMetrics) -> None:
        """Report continued texts to all observers."""
        self._each(lambda listener: listener.samples(metrics))

    def rewind(self, step: int) -> None:
        """Roll all observers back to this step."""
        for listener in self._listeners:
            listener.rewind(step)

    def note(self, message: str) -> None:
        """Report a message to all observers."""
        self._each(lambda listener: listener.note(message))

    def _forward_notes(self) -> None:
        for tracker in self._trackers:
            for note in tracker.take_notes():
                self.note(note)

    def _each(self, report: Callable[[Observer], None]) -> None:
        for listener in self._listeners:
            self._try(listener, partial(report, listener))

    def _try(self, listener: Observer, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            name = type(listener).__name__
            self._note_once(f"{name} could not write: {describe_write_error(error)}")

    def _note_once(self, problem: str) -> None:
        if problem not in self._failed:
            self._failed.add(problem)
            with suppress(OSError):  # the console may be a file on the same disk
                self._listeners[0].note(problem)

    def close(self) -> None:
        """Close all observers, even if one of them fails to close."""
        self._closing.close()
