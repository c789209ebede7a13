"""The command line; the package's docstring explains it."""

from __future__ import annotations

import argparse

from moa_dist.cli.arguments import between
from tests.benchmarks import claims
from tests.benchmarks.claims.contenders import CONTENDERS, QUESTIONS
from tests.benchmarks.claims.table import print_table
from tests.benchmarks.claims.training import train_all


def main() -> None:
    parser = argparse.ArgumentParser(description=(claims.__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="QUESTION | MODEL",
        default=["comparison"],
        help="what to train: all models of a question, or single ones; questions: "
        + "; ".join(f"{question} ({', '.join(QUESTIONS[question])})" for question in QUESTIONS),
    )
    parser.add_argument(
        "--steps", type=between(int, 1), metavar="N", help="steps at the best rate (all)"
    )
    parser.add_argument("--table", action="store_true", help="only print finished results")
    args = parser.parse_args()
    models = [model for name in args.names for model in QUESTIONS.get(name, (name,))]
    if unknown := set(models) - CONTENDERS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not args.table:
        train_all(models, args.steps)
    print_table(models, args.steps)


if __name__ == "__main__":
    main()
