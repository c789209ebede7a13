"""Draws held-out loss over tokens and over hours, and prints the time to another's final loss.

    python -m tests.benchmarks.claims.curves OUT.png MODEL ... [--steps N]

The first model is the one whose final loss the others should reach sooner. Lines are means over
seeds, bands go from the best seed to the worst. Hours are steps times the median step of the same
run, so without validation and checkpoints.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moa_dist.cli.arguments import between
from moa_dist.report.read import read_run
from tests.benchmarks.claims import training
from tests.benchmarks.claims.contenders import CONTENDERS
from tests.benchmarks.claims.training import finished


@dataclass(frozen=True)
class Curve:
    """Validation losses [V] of a model's finished seeds S, at the same steps."""

    model: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    """[S, V], nats per token."""
    step_hours: float
    tokens_per_step: int

    @staticmethod
    def of(model: str, steps: int | None) -> Curve:
        """Read the runs at the best rate. Raises SystemExit if none has finished."""
        runs = finished(model, steps)
        if not runs:
            raise SystemExit(f"{model}: no finished run in {training.RUNS}")
        series = [read_run(training.RUNS / run.name).series for run in runs]
        losses = [one["validation/loss"] for one in series]
        config = CONTENDERS[model].config()
        return Curve(
            model,
            losses[0].steps,
            np.stack([one.values for one in losses]),
            float(np.median([np.median(one["step_seconds"].values) for one in series])) / 3600,
            config.train.global_batch * config.data.sequence_length,
        )

    @property
    def hours(self) -> NDArray[np.float64]:
        return self.steps * self.step_hours

    def hours_to(self, loss: float) -> float:
        """Return when the mean loss falls to `loss`, interpolated; NaN if it never does."""
        mean = self.losses.mean(0)
        below = np.flatnonzero(mean <= loss)
        if not len(below):
            return float("nan")
        at = below[0]
        if at == 0:
            return float(self.hours[0])
        share = (mean[at - 1] - loss) / (mean[at - 1] - mean[at])
        return float(self.hours[at - 1] + share * (self.hours[at] - self.hours[at - 1]))


def draw(curves: list[Curve], path: Path) -> None:
    """Write one picture with both axes of cost."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        perplexities = np.exp(curve.losses)
        costs = curve.steps * curve.tokens_per_step / 1e6, curve.hours
        for axis, cost in zip(axes, costs, strict=True):
            (line,) = axis.plot(cost, perplexities.mean(0), label=curve.model)
            lowest, highest = perplexities.min(0), perplexities.max(0)
            axis.fill_between(cost, lowest, highest, alpha=0.2, color=line.get_color())
    axes[0].set_yscale("log")
    axes[0].set_ylabel("perplexity on held-out text")
    axes[0].set_xlabel("million tokens")
    axes[1].set_xlabel("hours")
    axes[0].legend()
    for axis in axes:
        axis.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("models", nargs="+", metavar="MODEL", choices=list(CONTENDERS))
    parser.add_argument(
        "--steps", type=between(int, 1), metavar="N", help="steps of the runs (all)"
    )
    args = parser.parse_args()
    models: list[str] = args.models
    curves = [Curve.of(model, args.steps) for model in models]
    draw(curves, args.out)
    goal = float(curves[0].losses.mean(0)[-1])
    for curve in curves:
        hours = curve.hours_to(goal)
        if math.isnan(hours):
            print(f"{curve.model}: never at loss {goal:.3f}")
            continue
        share = hours / curves[0].hours[-1]
        print(f"{curve.model}: {hours:.2f} h to loss {goal:.3f}, {share:.2f} of {models[0]}'s")


if __name__ == "__main__":
    main()
