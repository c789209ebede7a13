"""Tests the papers' central claim on a CPU: equal data, equal tokens, equal parameters.

    moa-dist prepare --input BOOKS --output data/comparison/train --documents blank-line \
        --vocab-size 2048 --sequence-length 256
    moa-dist prepare --input OTHER_BOOKS --output data/comparison/valid --documents blank-line \
        --tokenizer data/comparison/train/tokenizer.json --sequence-length 256
    python -m tests.benchmarks.claims [MODEL ...] [--steps N] [--table]
    python -m tests.benchmarks.claims dense family

Trains every model of configs/comparison/ in one process, and MoEUT with Muon, too; `family` names
those of configs/family/, which have as many parameters, with one seed each. Three or four learning
rates for a tenth of the budget (half of that is the full run's warm-up) with seed 0; then
the best rate for the whole budget, with one or more seeds (`CONTENDERS`). Takes hours, and resumes
after an interruption. `--steps` makes the budget smaller, `--table` only prints finished results.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.config import load_config
from moa_dist.errors import ExitCode
from moa_dist.models.counts import count
from moa_dist.report.read import read_run
from tests.config.test_shipped_configs import CONFIGS

RATES = (4e-3, 8e-3, 16e-3, 32e-3)
TUNING_STEPS = 128
RUNS = Path("runs/comparison")


@dataclass(frozen=True)
class Contender:
    """What is compared: a file of a folder of configs/, changed by overrides."""

    file: str
    seeds: int = 1
    rates: tuple[float, ...] = RATES
    overrides: tuple[str, ...] = ()
    folder: str = "comparison"

    @property
    def config_file(self) -> Path:
        return CONFIGS / self.folder / f"{self.file}.yaml"


COMPARISON = {
    "moeut": Contender("moeut", seeds=3),
    "dense": Contender("dense", seeds=3),
    "switchhead": Contender("switchhead"),
    "moa": Contender("moa"),
    "universal": Contender("universal"),
    "moeut-muon": Contender("moeut", rates=RATES[1:], overrides=("optimizer.kind=muon",)),
}
FAMILY = {
    path.stem: Contender(path.stem, folder="family")
    for path in sorted((CONFIGS / "family").glob("*.yaml"))
    # BAM starts from random weights, like the others; Mod-Squad needs data of several tasks.
    if path.stem not in ("bam_seed", "mod_squad")
}
CONTENDERS = COMPARISON | FAMILY


@dataclass(frozen=True)
class Training:
    """One run: a contender, a learning rate and a seed; `steps` None means the whole budget."""

    model: str
    rate: float
    seed: int = 0
    steps: int | None = None

    @property
    def name(self) -> str:
        kinds = {None: "full", TUNING_STEPS: "tune"}
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
        total = self.steps or load_config(self.contender.config_file).train.steps
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
            command = [
                sys.executable,
                "launcher/train.py",
                "--config",
                str(self.contender.config_file),
            ]
            done = subprocess.run([*command, *overrides], env=os.environ | {"WORLD_SIZE": "1"})
            if done.returncode == ExitCode.NOT_FINITE:
                self.diverged.touch()
            else:
                done.check_returncode()


def tuned(model: str) -> list[Training]:
    return [Training(model, rate, steps=TUNING_STEPS) for rate in CONTENDERS[model].rates]


def best_rate(model: str) -> float | None:
    """Return the best learning rate tried, or None until all have finished."""
    losses = {training.rate: training.loss() for training in tuned(model)}
    found = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(found, key=found.__getitem__) if len(found) == len(losses) else None


def train_all(models: list[str], steps: int | None) -> None:
    for model in models:
        for training in tuned(model):
            training.run()
    for seed in range(max(contender.seeds for contender in CONTENDERS.values())):
        for model in models:
            rate = best_rate(model)
            if rate is not None and seed < CONTENDERS[model].seeds:
                Training(model, rate, seed, steps).run()


def print_table(models: list[str], steps: int | None) -> None:
    """Print finished results as Markdown; `s` are seconds per step in the run with seed 0."""
    rates = " | ".join(f"lr {rate:g}" for rate in RATES)
    print(f"| model | parameters, M | MMAC per token | {rates} | seeds | perplexity | spread | s |")
    print("|---" * (7 + len(RATES)) + "|")
    notes = []
    for model in models:
        contender = CONTENDERS[model]
        config = load_config(contender.config_file)
        counts = count(config.model, config.data.sequence_length)
        tuning = {training.rate: training.loss() for training in tuned(model)}
        found = [tuning.get(rate) for rate in RATES]
        cells = ["" if loss is None else f"{math.exp(loss):.1f}" for loss in found]
        rate = best_rate(model)
        seeds = range(contender.seeds if rate is not None else 0)
        losses = [Training(model, rate or 0, seed, steps).loss() for seed in seeds]
        values = [math.exp(loss) for loss in losses if loss is not None]
        mean = f"{statistics.mean(values):.2f}" if values else ""
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        numbers = (
            f"{counts.total / 1e6:.3f} | {counts.total_macs / counts.sequence_length / 1e6:.2f}"
        )
        seconds = Training(model, rate or 0, steps=steps).step_seconds() if values else ""
        results = f"{len(values)} | {mean} | {spread} | {seconds}"
        print(f"| {model} | {numbers} | {' | '.join(cells)} | {results} |")
        if config.model.looks_ahead:
            notes.append(f"{model}: does not compare; {config.model.looks_ahead}")
    print("", *notes, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"models to train: {', '.join(COMPARISON)} (these), {', '.join(FAMILY)}; `family` for "
        "all of the latter",
    )
    parser.add_argument(
        "--steps", type=between(int, 1), metavar="N", help="steps of the best rate (all)"
    )
    parser.add_argument("--table", action="store_true", help="only print finished results")
    args = parser.parse_args()
    models = [
        model
        for name in args.models or COMPARISON
        for model in (FAMILY if name == "family" else [name])
    ]
    if unknown := set(models) - CONTENDERS.keys():
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if not args.table:
        train_all(models, args.steps)
    print_table(models, args.steps)


if __name__ == "__main__":
    main()
