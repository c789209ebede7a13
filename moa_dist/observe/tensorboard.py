"""Writes TensorBoard curves and pictures over training steps.

TensorBoard groups tags by what precedes the first slash, and sorts groups and tags by name. Hence
the names: losses come first, then what the optimizer does, then routing with a group per layer.
The event files lie in the run's own folder, so that `tensorboard --logdir runs` shows a run under
its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.utils.tensorboard import SummaryWriter

from moa_dist.config import to_yaml
from moa_dist.models.stack import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.layout import layout
from moa_dist.observe.load_pictures import load_pictures
from moa_dist.observe.metrics import RunStart, StepMetrics, ValidationMetrics
from moa_dist.observe.routing import routing_summary
from moa_dist.observe.traffic_names import traffic_summary
from moa_dist.peak_flops import peak_flops


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
        yaml = "    " + to_yaml(run.config).replace("\n", "\n    ")  # a Markdown code block
        self._writer.add_text("config", yaml, run.first_step)

    def step(self, metrics: StepMetrics) -> None:
        """Write one point of every curve."""
        self._routing = metrics.routing
        values = {
            "loss/train": metrics.loss,
            "perplexity/train": math.exp(min(metrics.loss, 700.0)),  # beyond, exp overflows
            "optimizer/lr": metrics.lr,
            "optimizer/grad_norm": metrics.grad_norm,
        }
        values |= {f"loss/train_aux/{name}": value for name, value in metrics.aux_losses.items()}
        values |= self._speed(metrics.tokens_per_second)
        for call, report in metrics.routing.items():
            for name, value in routing_summary(report).items():
                tag = f"routing_layer{call.layer}/{call.router}/{name}/repeat{call.repeat}"
                values[tag] = value
        if metrics.traffic:
            summary = traffic_summary(metrics.traffic)
            values |= {f"traffic/{name}": value for name, value in summary.items()}
        timing = metrics.timing
        values |= {
            "time/step_seconds": timing.step_seconds,
            "time/communication_share": timing.communication_share,
            "time/work_seconds_of_slowest_rank": timing.slowest.seconds,
            "time/work_seconds_of_fastest_rank": timing.fastest.seconds,
            "time/slowest_rank": float(timing.slowest.rank),
        }
        for name, read in metrics.sources.items():
            values |= {f"data/{name}/share": read.share, f"data/{name}/epochs": read.epochs}
        values |= {f"rank0_gpu/{name}": value for name, value in metrics.gpu.items()}
        if not self._is_laid_out:
            self._lay_out(values)
        self._scalars(values, metrics.step)

    def _lay_out(self, values: Iterable[str]) -> None:
        assert self._run is not None, "start comes first"
        is_validated = bool(self._run.config.data.held_out)
        later = ["loss/validation", "loss/validation_bits_per_byte"] if is_validated else []
        self._events.add_custom_scalars(layout([*values, *later]))
        self._is_laid_out = True

    def validation(self, metrics: ValidationMetrics) -> None:
        """Write one point per curve, and a picture of each router's last reported load."""
        values = {
            "loss/validation": metrics.loss,
            "perplexity/validation": metrics.perplexity,
        }
        if metrics.bits_per_byte is not None:
            values["loss/validation_bits_per_byte"] = metrics.bits_per_byte
        if len(metrics.losses) > 1:
            values |= {f"loss/validation_{name}": loss for name, loss in metrics.losses.items()}
        values |= {f"tasks/{name}": value for name, value in metrics.tasks.items()}
        self._scalars(values, metrics.step)
        for router, picture in load_pictures(self._routing).items():
            tag = f"routing/load_{router}"
            self._events.add_image(tag, picture, metrics.step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        """Go on in a new event file, which hides all points after this step."""
        assert self._run is not None, "start comes first"
        self._events.close()
        self._writer = _open(self._run, step)
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

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        assert self._run is not None, "start comes first"
        flops = self._run.flops_per_token * tokens_per_second
        peak = peak_flops(self._run.device, self._run.config.train.precision)
        values = {"speed/tokens_per_second": tokens_per_second}
        if peak is None:
            return values | {"speed/flops_per_second": flops}
        return values | {"speed/model_flops_utilization": flops / (self._run.world_size * peak)}

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)


def _open(run: RunStart, step: int) -> SummaryWriter:
    """Open a new event file; it hides what others hold for the steps after `step`."""
    return SummaryWriter(run.folder, purge_step=step + 1, flush_secs=30)
