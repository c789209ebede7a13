"""`moa-dist translate`: translate a file; see `moa_dist.evaluate.translate`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.cli.progress import ProgressLine
from moa_dist.cli.rank_output import say_once
from moa_dist.data.text import read_lines
from moa_dist.distributed.start import init_distributed
from moa_dist.errors import MoaDistError
from moa_dist.evaluate.trained import Trained, load_trained
from moa_dist.evaluate.translate import Search, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, of one checkpoint, of an average, or of "
        "an export",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="a text per line (also .gz, .bz2, .xz); translations are printed, a line for each",
    )
    add_search_arguments(parser)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how translations are searched."""
    default = Search()
    parser.add_argument(
        "--beam",
        type=between(int, 1, 100),
        default=default.beam,
        metavar="K",
        help=f"hypotheses per text ({default.beam})",
    )
    parser.add_argument(
        "--length-penalty",
        type=between(float, 0),
        default=default.length_penalty,
        metavar="A",
        help=f"log-probabilities are divided by length ** A ({default.length_penalty})",
    )
    parser.add_argument(
        "--texts", type=between(int, 1), default=32, metavar="N", help="translated at once (32)"
    )


def warn_of_long_texts(trained: Trained, texts: list[str]) -> None:
    """Say how many are longer than any that the model has seen."""
    longest = trained.config.data.sequence_length
    num_longer = sum(len(text) > longest for text in trained.tokenizer.encode_batch(texts))
    if num_longer:
        print(
            f"{num_longer:,} of {len(texts):,} texts are longer than the {longest} tokens that the "
            "model was trained on: expect little of their translations, or split them",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Print the translations; returns the exit status."""
    if "RANK" not in os.environ:
        _translate(args, rank=0)
        return 0
    try:
        with init_distributed() as context:
            _translate(args, context.rank)
    except MoaDistError as error:
        say_once(int(os.environ["RANK"]), str(error))
        return 2
    return 0


def _translate(args: argparse.Namespace, rank: int) -> None:
    texts = list(read_lines(args.input))
    trained = load_trained(args.path)
    if rank == 0:
        warn_of_long_texts(trained, texts)
    found = translate(
        trained,
        texts,
        Search(args.beam, args.length_penalty),
        batch=args.texts,
        progress=partial(ProgressLine(), "translating") if rank == 0 else None,
    )
    if rank == 0:
        sys.stdout.writelines(" ".join(text.splitlines()) + "\n" for text in found)
        sys.stdout.flush()
