"""The curves of a run: one mapping of names to values, which all trackers take.

TensorBoard and others group names by what precedes the first slash, and sort groups and names.
Hence the names: losses come first, then what the optimizer does, then routing with a group per
layer.
"""

from __future__ import annotations

import math

from moa_dist.observe.metrics import RunStart, StepMetrics, ValidationMetrics
from moa_dist.observe.routing import routing_summary
from moa_dist.observe.traffic_names import traffic_summary
from moa_dist.peak_flops import peak_flops

TOKENS = "progress/tokens"
"""Name of the tokens read so far, which every record has."""


def step_values(run: RunStart, metrics: StepMetrics) -> dict[str, float]:
    """Return the values of one step by name."""
    values = {
        "loss/train": metrics.loss,
        "perplexity/train": math.exp(min(metrics.loss, 700.0)),  # beyond, exp overflows
        "optimizer/lr": metrics.lr,
        "optimizer/grad_norm": metrics.grad_norm,
        TOKENS: float(metrics.tokens_read),
        "progress/samples": float(metrics.samples),
    }
    for part, norms in metrics.parts.items():
        values[f"optimizer/grad_norm_of_part/{part}"] = norms.grad_norm
        values[f"optimizer/update_ratio/{part}"] = norms.update_ratio
    values |= {f"loss/train_aux/{name}": value for name, value in metrics.aux_losses.items()}
    values |= {f"tokens/{name}": value for name, value in metrics.token_means.items()}
    values |= _speed(run, metrics.tokens_per_second)
    for call, report in metrics.routing.items():
        for name, value in routing_summary(report, run.mean_names.get(call.key, ())).items():
            values[f"routing_layer{call.layer}/{call.router}/{name}/repeat{call.repeat}"] = value
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
    return values | {f"rank0_gpu/{name}": value for name, value in metrics.gpu.items()}


def validation_values(metrics: ValidationMetrics) -> dict[str, float]:
    """Return the values of one validation pass by name."""
    values = {
        "loss/validation": metrics.loss,
        "perplexity/validation": metrics.perplexity,
        TOKENS: float(metrics.tokens_read),
    }
    if metrics.bits_per_byte is not None:
        values["loss/validation_bits_per_byte"] = metrics.bits_per_byte
    if len(metrics.losses) > 1:
        values |= {f"loss/validation_{name}": loss for name, loss in metrics.losses.items()}
    return values | {f"tasks/{name}": value for name, value in metrics.tasks.items()}


def _speed(run: RunStart, tokens_per_second: float) -> dict[str, float]:
    flops = run.flops_per_token * tokens_per_second
    peak = peak_flops(run.device, run.config.train.precision)
    values = {"speed/tokens_per_second": tokens_per_second}
    if peak is None:
        return values | {"speed/flops_per_second": flops}
    return values | {"speed/model_flops_utilization": flops / (run.world_size * peak)}
