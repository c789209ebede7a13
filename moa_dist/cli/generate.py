"""`moa-dist generate`: continue texts; see `moa_dist.evaluate.generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moa_dist.cli.arguments import between, utf8
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.evaluate.sampling import Sampling
from moa_dist.evaluate.trained import load_trained, require


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
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="text to continue, empty for the beginning of a document; given several times, all "
        "are continued at once, and the first is printed as it comes",
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
        "--top-k",
        type=between(int, 1),
        metavar="K",
        help="draw from the K most probable tokens (all)",
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
    """Print each prompt and what the model adds to it; returns the exit status."""
    trained = load_trained(args.path)
    require(trained, "causal", "to continue a text")
    prompts = trained.tokenizer.encode_batch(args.prompts)
    longest, seen = max(map(len, prompts)), trained.config.data.sequence_length
    if longest + args.tokens > seen:
        print(
            f"{longest} tokens of prompt and {args.tokens} to add are more than the {seen} that "
            "the model was trained on: it sees the newest of them only",
            file=sys.stderr,
        )
    drawn = generate(
        trained.model,
        prompts,
        Sampling(args.temperature, args.top_k, args.top_p),
        max_new_tokens=args.tokens,
        seed=args.seed,
        end_of_document=trained.tokenizer.end_of_document,
        max_length=seen,
    )
    texts = list(args.prompts)
    print(texts[0], end="", flush=True)
    for prompt, text in stream_text(trained.tokenizer, drawn):
        texts[prompt] += text
        if prompt == 0:
            print(text, end="", flush=True)
    print()
    for text in texts[1:]:
        print(f"\n{text}")
    return 0
