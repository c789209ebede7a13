"""Fits how the loss falls with parameters: loss = c * parameters ** -exponent, at equal tokens.

    python -m tests.benchmarks.claims.scaling [--steps N]

Least squares over logarithms of all finished runs of `claims widths`. The error of an exponent is
its standard error, in which a law that bends weighs as much as seeds that differ.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from moa_dist.cli.arguments import between
from moa_dist.models.counts import count
from tests.benchmarks.claims.contenders import CONTENDERS, QUESTIONS
from tests.benchmarks.claims.training import finished


def fit(sizes: list[float], losses: list[float]) -> tuple[float, float]:
    """Return the exponent and its standard error."""
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(losses), 1, cov=True)
    return -float(slope), math.sqrt(covariance[0, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=between(int, 1), metavar="N", help="steps of the runs (all)"
    )
    steps: int | None = parser.parse_args().steps
    for family in ("moeut", "dense"):
        sizes, losses = [], []
        for model in QUESTIONS["widths"]:
            if model.partition("-")[0] == family:
                of_model = [run.loss() or math.nan for run in finished(model, steps)]
                sizes += [float(count(CONTENDERS[model].config().model, 1).total)] * len(of_model)
                losses += of_model
        if len(sizes) < 3:
            print(f"{family}: {len(sizes)} finished runs, which fit any line")
            continue
        exponent, error = fit(sizes, losses)
        print(f"{family}: {exponent:.3f} +- {error:.3f}, {len(sizes)} runs")


if __name__ == "__main__":
    main()
