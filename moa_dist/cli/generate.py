"""`moa-dist generate`: continue a text; see `moa_dist.evaluate.generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_dist.cli.arguments import between, utf8
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.evaluate.trained import load_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, of one checkpoint, or of an export",
    )
    parser.add_argument(
        "--prompt",
        type=utf8,
        required=True,
        metavar="TEXT",
        help="text to continue; empty for the beginning of a document",
    )
    parser.add_argument(
        "--tokens", type=between(int, 1), default=100, metavar="N", help="the most to add (100)"
    )
    parser.add_argument(
        "--temperature",
        type=between(float, 0),
        default=0.8,
        metavar="T",
        help="above 1 more surprising, below 1 less; 0 takes the most probable token (0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=between(float, 0, 1),
        default=0.95,
        metavar="P",
        help="draw from the fewest tokens that together have this probability (0.95)",
    )
    parser.add_argument(
        "--seed", type=between(int, 0, 2**63 - 1), default=0, help="of the random choices (0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what the model adds to it; returns the exit status."""
    trained = load_trained(args.path)
    ids = generate(
        trained.model,
        trained.tokenizer.encode(args.prompt),
        max_new_tokens=args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        end_of_document=trained.tokenizer.end_of_document,
        max_length=trained.config.data.sequence_length,
    )
    print(args.prompt, end="", flush=True)
    for text in stream_text(trained.tokenizer, ids):
        print(text, end="", flush=True)
    print()
    return 0
