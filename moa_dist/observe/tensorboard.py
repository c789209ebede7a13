"""Writes TensorBoard curves and pictures over training steps.

The event files lie in the run's own folder, so that `tensorboard --logdir runs` shows a run under
its name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.utils.tensorboard import SummaryWriter

from moa_dist.config import to_yaml
from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.layout import layout
from moa_dist.observe.load_pictures import load_pictures
from moa_dist.observe.metrics import RunStart, SampleMetrics, StepMetrics, ValidationMetrics
from moa_dist.observe.scalars import step_values, validation_values


class TensorBoard:
    """Writes events, and defines the charts of the tab "Custom scalars" (see `layout`)."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._is_laid_out = False
        self._run: RunStart | None = None
        self._routing: dict[RouterCall, RoutingReport] = {}

    def start(self, run: RunStart) -> None:
        """Open the event file and write the configuration."""
        self._run = run
        self._writer = _open(run, run.first_step)
        self._writer.add_text("config", _code_block(to_yaml(run.config)), run.first_step)

    def step(self, metrics: StepMetrics) -> None:
        """Write one point of every curve."""
        self._routing = metrics.routing
        values = step_values(self._started, metrics)
        if not self._is_laid_out:
            self._lay_out(values)
        self._scalars(values, metrics.step)

    def _lay_out(self, values: Iterable[str]) -> None:
        is_validated = bool(self._started.config.data.held_out)
        later = ["loss/validation", "loss/validation_bits_per_byte"] if is_validated else []
        self._events.add_custom_scalars(layout([*values, *later]))
        self._is_laid_out = True

    def validation(self, metrics: ValidationMetrics) -> None:
        """Write one point per curve, and a picture of each router's last reported load."""
        self._scalars(validation_values(metrics), metrics.step)
        for router, picture in load_pictures(self._routing).items():
            tag = f"routing/load_{router}"
            self._events.add_image(tag, picture, metrics.step, dataformats="HWC")

    def samples(self, metrics: SampleMetrics) -> None:
        """Write each prompt with its continuation, as a text of its own."""
        for i, (prompt, text) in enumerate(metrics.samples):
            self._events.add_text(f"samples/{i}", _code_block(prompt + text), metrics.step)

    def rewind(self, step: int) -> None:
        """Go on in a new event file, which hides all points after this step."""
        self._events.close()
        self._writer = _open(self._started, step)
        self._routing = {}

    def note(self, message: str) -> None:
        """Do nothing: TensorBoard shows curves, not messages."""

    def close(self) -> None:
        """Write buffered events and close the file."""
        if self._writer is not None:
            self._writer.close()

    @property
    def _events(self) -> SummaryWriter:
        assert self._writer is not None, "start comes first"
        return self._writer

    @property
    def _started(self) -> RunStart:
        assert self._run is not None, "start comes first"
        return self._run

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)


def _code_block(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "    " + text.replace("\n", "\n    ")


def _open(run: RunStart, step: int) -> SummaryWriter:
    """Open a new event file; it hides what others hold for the steps after `step`."""
    return SummaryWriter(run.folder, purge_step=step + 1, flush_secs=30)
