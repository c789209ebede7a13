"""All that listens to a run, as one observer."""

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
    """Passes everything on to the console, the metrics file and, if configured, TensorBoard.

    What one of them cannot write, on a full disk, is missing there, and training goes on: whether
    it may without checkpoints is another question, which `checkpoint.on_failure` answers.
    Every rank may make one, for nothing is opened before `start`; rank 0 alone uses it.
    """

    def __init__(self, config: Config) -> None:
        self._tensorboard = config.logging.tensorboard
        self._listeners: list[Observer] = [Console(), MetricsFile()]
        self._gpu: GpuTelemetry | None = None
        self._closing = ExitStack()
        self._failed: set[str] = set()

    def start(self, run: RunStart) -> None:
        """See `Observer.start`. The rank's device must be torch's current one."""
        on_gpu = run.device.startswith("cuda")
        self._gpu = GpuTelemetry(
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        self._closing.callback(self._gpu.close)
        if self._tensorboard:
            # Imported here: it takes a second, and a run without TensorBoard need not wait.
            from moa_dist.observe.tensorboard import TensorBoard

            self._listeners.append(TensorBoard())
        for listener in self._listeners:
            self._closing.callback(self._try, listener, listener.close)
            listener.start(run)
        if self._gpu.reason:
            self.note(self._gpu.reason)

    def step(self, metrics: StepMetrics) -> None:
        """See `Observer.step`. Adds what the GPU says."""
        assert self._gpu is not None, "start comes first"
        metrics = replace(metrics, gpu=self._gpu.read())
        self._each(lambda listener: listener.step(metrics))

    def validation(self, metrics: ValidationMetrics) -> None:
        """See `Observer.validation`."""
        self._each(lambda listener: listener.validation(metrics))

    def rewind(self, step: int) -> None:
        """See `Observer.rewind`."""
        for listener in self._listeners:
            listener.rewind(step)

    def note(self, message: str) -> None:
        """See `Observer.note`."""
        self._each(lambda listener: listener.note(message))

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for listener in self._listeners:
            self._try(listener, partial(tell, listener))

    def _try(self, listener: Observer, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._say_once(f"{type(listener).__name__} lacks lines: {describe_write_error(error)}")

    def _say_once(self, problem: str) -> None:
        if problem not in self._failed:
            self._failed.add(problem)
            with suppress(OSError):  # the console may be a file on the same disk
                self._listeners[0].note(problem)

    def close(self) -> None:
        """See `Observer.close`. Closes all, also if one of them fails to."""
        self._closing.close()
