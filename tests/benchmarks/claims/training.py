"""Trains contenders as a user does, resumably, and reads what came of it."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moa_dist.errors import ExitCode
from moa_dist.report.read import read_run
from tests.benchmarks.claims.contenders import CONTENDERS, Contender

RUNS = Path("runs/comparison")


@dataclass(frozen=True)
class Training:
    """One run: a contender, a learning rate and a seed; `steps` None means the whole budget."""

    model: str
    rate: float
    seed: int = 0
    steps: int | None = None

    @property
    def name(self) -> str:
        kinds = {self.contender.tuning_steps: "tune", None: "full"}
        kind = kinds.get(self.steps, f"{self.steps}-steps")
        return f"{self.model}-{kind}-lr{self.rate:g}-seed{self.seed}"

    @property
    def contender(self) -> Contender:
        return CONTENDERS[self.model]

    @property
    def diverged(self) -> Path:
        """The file that marks a diverged run."""
        return RUNS / self.name / "diverged"

    def loss(self) -> float | None:
        """Return the last validation loss: infinite if diverged, None if unfinished."""
        if self.diverged.exists():
            return math.inf
        total = self.steps or self.contender.config().train.steps
        if not (RUNS / self.name / "metrics.jsonl").exists():
            return None
        losses = read_run(RUNS / self.name).series.get("validation/loss")
        if losses is None or len(losses.steps) == 0 or losses.steps[-1] < total:
            return None
        return float(losses.values[-1])

    def step_seconds(self) -> str:
        """Return the median time of a step, without validation and checkpoints."""
        times = read_run(RUNS / self.name).series["step_seconds"].values
        return f"{statistics.median(times):.2f}"

    def run(self) -> None:
        """Train unless finished. Raises CalledProcessError for failures other than divergence."""
        if self.loss() is None:
            overrides = [f"name={self.name}", f"output={RUNS}", f"optimizer.lr={self.rate}"]
            overrides += [f"train.seed={self.seed}", f"data.seed={self.seed}"]
            overrides += self.contender.overrides
            if self.steps is not None:
                overrides.append(f"train.steps={self.steps}")
            file = str(self.contender.config_file)
            command = [sys.executable, "launcher/train.py", "--config", file, *overrides]
            done = subprocess.run(command, env=os.environ | {"WORLD_SIZE": "1"})
            if done.returncode == ExitCode.NOT_FINITE:
                self.diverged.touch()
            else:
                done.check_returncode()


def tuned(model: str) -> list[Training]:
    contender = CONTENDERS[model]
    return [Training(model, rate, steps=contender.tuning_steps) for rate in contender.rates]


def best_rate(model: str) -> float | None:
    """Return the best learning rate tried, or None until all have finished."""
    losses = {training.rate: training.loss() for training in tuned(model)}
    found = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(found, key=found.__getitem__) if len(found) == len(losses) else None


def finished(model: str, steps: int | None) -> list[Training]:
    """Return the runs at the best rate that have finished, by seed; empty before it is known."""
    rate = best_rate(model)
    if rate is None:
        return []
    runs = [Training(model, rate, seed, steps) for seed in range(CONTENDERS[model].seeds)]
    return [run for run in runs if run.loss() is not None]


def train_all(models: list[str], steps: int | None) -> None:
    """Tune all models, then train them seed by seed; `steps` None means each one's own budget."""
    for model in models:
        for training in tuned(model):
            training.run()
    for seed in range(max(CONTENDERS[model].seeds for model in models)):
        for model in models:
            rate = best_rate(model)
            if rate is not None and seed < CONTENDERS[model].seeds:
                Training(model, rate, seed, steps).run()
