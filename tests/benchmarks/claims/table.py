"""Prints finished results as Markdown."""

from __future__ import annotations

import math
import statistics

from moa_dist.models.counts import count
from tests.benchmarks.claims.contenders import CONTENDERS
from tests.benchmarks.claims.training import best_rate, finished, tuned

COLUMNS = ("model", "parameters, M", "MMAC per token", "lr", "seeds", "perplexity", "spread", "s")
"""`lr` is the best rate, with the perplexities of all in short runs; `s` are seconds per step.
Where evaluation takes fewer experts than training, MMACs are those of training / evaluation."""


def print_table(models: list[str], steps: int | None) -> None:
    """Print a row per model, and what keeps a model from being compared below."""
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for model in models:
        print(f"| {' | '.join(row(model, steps))} |")
    looks_ahead = {model: CONTENDERS[model].config().model.looks_ahead for model in models}
    print("", *(f"{model}: {why}" for model, why in looks_ahead.items() if why), sep="\n")


def row(model: str, steps: int | None) -> list[str]:
    config = CONTENDERS[model].config()
    counts = count(config.model, config.data.sequence_length)
    work = (counts.training, counts.evaluation)
    macs = [f"{each.total_macs / counts.sequence_length / 1e6:.2f}" for each in work]
    cells = [model, f"{counts.total / 1e6:.3f}", " / ".join(dict.fromkeys(macs))]
    rate = best_rate(model)
    if rate is None:
        return [*cells, "", "0", "", "", ""]
    tried = ", ".join(f"{math.exp(run.loss() or 0):.1f} at {run.rate:g}" for run in tuned(model))
    runs = finished(model, steps)
    values = [math.exp(run.loss() or 0) for run in runs]
    return [
        *cells,
        f"{rate:g} ({tried})",
        str(len(values)),
        f"{statistics.mean(values):.2f}" if values else "",
        f"{statistics.stdev(values):.2f}" if len(values) > 1 else "",
        runs[0].step_seconds() if values else "",
    ]
