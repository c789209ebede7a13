"""Scores translations by finished models, and asks which differ from the first model's.

    python -m tests.benchmarks.claims.translation SOURCE REFERENCE MODEL ... [--steps N]

A run translates by the mean of its last five checkpoints, with beam search of width 4. `p` of each
seed is that of sacrebleu's paired bootstrap: how often a choice of sentences alone makes a
difference in BLEU as large as that to the first model with the same seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from moa_dist.checkpoint.average import average
from moa_dist.checkpoint.format import checkpoints
from moa_dist.cli.arguments import between
from moa_dist.data.decoding import read_lines
from moa_dist.evaluate.trained import load_trained
from moa_dist.evaluate.translate import Search, translate
from tests.benchmarks.claims import training
from tests.benchmarks.claims.contenders import TRANSLATION
from tests.benchmarks.claims.training import Training, finished

COLUMNS = ("model", "lr", "seeds", "BLEU", "spread", "chrF", "spread", "p")
_CHECKPOINTS, _BATCH = 5, 32


class Score(NamedTuple):
    """How well one run translates."""

    bleu: float
    chrf: float
    p: float | None
    """None for the model that others are compared with."""


def translations(run: Training, sources: list[str]) -> list[str]:
    mean = training.RUNS / f"{run.name}-mean"
    if not mean.exists():
        average(checkpoints(training.RUNS / run.name)[-_CHECKPOINTS:], mean)
    return translate(load_trained(mean), sources, Search(), batch=_BATCH)


def compare(found: dict[str, list[str]], references: list[str]) -> tuple[dict[str, Score], str]:
    """Compare translations with those of the first model; return scores and their signatures."""
    metrics = {"BLEU": BLEU(references=[references]), "chrF": CHRF(references=[references])}
    signatures, table = PairedTest(list(found.items()), metrics, None, test_type="bs")()
    (bleu, bleu_results), (chrf, chrf_results) = list(table.items())[1:]
    scores = {
        model: Score(one.score, other.score, one.p_value)
        for model, one, other in zip(found, bleu_results, chrf_results, strict=True)
    }
    return scores, f"{bleu}|{signatures[bleu]}, {chrf}|{signatures[chrf]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="texts to translate, one per line")
    parser.add_argument("reference", type=Path, help="their translations, one per line")
    parser.add_argument("models", nargs="+", metavar="MODEL", choices=list(TRANSLATION))
    parser.add_argument(
        "--steps", type=between(int, 1), metavar="N", help="steps of the runs (all)"
    )
    args = parser.parse_args()
    sources, references = (list(read_lines(file)) for file in (args.source, args.reference))
    models: list[str] = args.models
    runs = {model: finished(model, args.steps) for model in models}
    if not runs[models[0]]:
        raise SystemExit(f"{models[0]}: no finished run in {training.RUNS}")
    scores: dict[str, list[Score]] = {model: [] for model in models}
    for seed in range(len(runs[models[0]])):
        of_seed = {model: run for model in models for run in runs[model] if run.seed == seed}
        found = {model: translations(run, sources) for model, run in of_seed.items()}
        by_model, signatures = compare(found, references)
        for model, score in by_model.items():
            scores[model].append(score)
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for model in models:
        if scores[model]:
            print(f"| {' | '.join(row(model, runs[model][0].rate, scores[model]))} |")
    print("", signatures, sep="\n")


def row(model: str, rate: float, scores: list[Score]) -> list[str]:
    cells = [model, f"{rate:g}", str(len(scores))]
    for values in ([score.bleu for score in scores], [score.chrf for score in scores]):
        cells.append(f"{statistics.mean(values):.1f}")
        cells.append(f"{statistics.stdev(values):.1f}" if len(values) > 1 else "")
    cells.append(", ".join(f"{score.p:.3f}" for score in scores if score.p is not None))
    return cells


if __name__ == "__main__":
    main()
