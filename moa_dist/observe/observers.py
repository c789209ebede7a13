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
from moa_dist.observe.metrics import Observer, RunStart, StepMetrics, ValidationMetrics


class Observers:
    """Forwards every report to the console, the metrics file and, if configured, TensorBoard.

    If one of them cannot write, for example on a full disk, its lines are lost and training
    continues; whether training may continue without checkpoints is up to `checkpoint.on_failure`.
    Every rank may create one, since nothing is opened before `start`; only rank 0 uses it.
    """

    def __init__(self, config: Config) -> None:
        self._tensorboard = config.logging.tensorboard
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
        if self._tensorboard:
            # Imported here because it takes a second, which a run without TensorBoard can save.
            from moa_dist.observe.tensorboard import TensorBoard

            self._listeners.append(TensorBoard())
        for listener in self._listeners:
            self._closing.callback(self._try, listener, listener.close)
            listener.start(run)
        if self._gpu.reason:
            self.note(self._gpu.reason)

    def step(self, metrics: StepMetrics) -> None:
        """Report a step to all observers, with the GPU's readings."""
        assert self._gpu is not None, "start comes first"
        metrics = replace(metrics, gpu=self._gpu.read())
        self._each(lambda listener: listener.step(metrics))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation pass to all observers."""
        self._each(lambda listener: listener.validation(metrics))

    def rewind(self, step: int) -> None:
        """Roll all observers back to this step."""
        for listener in self._listeners:
            listener.rewind(step)

    def note(self, message: str) -> None:
        """Report a message to all observers."""
        self._each(lambda listener: listener.note(message))

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
