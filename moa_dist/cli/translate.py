"""`moa-dist translate`: translates a file; `moa_dist.evaluate.translate` does the work."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from moa_dist.cli.arguments import add_model_path, between
from moa_dist.cli.progress import ProgressLine
from moa_dist.cli.rank_output import run_on_ranks
from moa_dist.data.decoding import read_lines
from moa_dist.evaluate.trained import Trained, load_trained
from moa_dist.evaluate.translate import Search, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_path(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with one text per line (also .gz, .bz2, .xz); prints one translation per line",
    )
    add_search_arguments(parser)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of beam search."""
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
        "--texts",
        type=between(int, 1),
        default=32,
        metavar="N",
        help="texts to translate at once (32)",
    )


def warn_of_long_texts(trained: Trained, texts: list[str]) -> None:
    """Print a warning if texts are longer than those that the model was trained on."""
    longest = trained.config.data.sequence_length
    num_longer = sum(len(text) > longest for text in trained.tokenizer.encode_batch(texts))
    if num_longer:
        print(
            f"warning: {num_longer:,} of {len(texts):,} texts exceed the {longest} tokens that the "
            "model was trained on: expect poor translations, or split them",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Translate and print; returns the exit status."""
    return run_on_ranks(partial(_translate, args))


def _translate(args: argparse.Namespace, rank: int, world_size: int) -> None:
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
