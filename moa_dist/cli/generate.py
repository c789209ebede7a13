"""`moa-dist generate`: continues texts; `moa_dist.evaluate.generate` does the work."""

from __future__ import annotations

import argparse
import sys

from moa_dist.cli.arguments import add_model_path, add_task, between, utf8
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.evaluate.sampling import Sampling
from moa_dist.evaluate.trained import load_trained, require, require_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_path(parser)
    parser.add_argument(
        "--prompt",
        type=utf8,
        required=True,
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="text to continue, empty to start a document; if repeated, all prompts are continued "
        "together, and the first is printed token by token",
    )
    parser.add_argument(
        "--tokens",
        type=between(int, 1),
        default=100,
        metavar="N",
        help="at most N new tokens (100)",
    )
    parser.add_argument(
        "--temperature",
        type=between(float, 0),
        default=0.8,
        metavar="T",
        help="above 1 gives more surprising text, below 1 less; 0 always takes the most probable "
        "token (0.8)",
    )
    parser.add_argument(
        "--top-k",
        type=between(int, 1),
        metavar="K",
        help="sample from the K most probable tokens (all)",
    )
    parser.add_argument(
        "--top-p",
        type=between(float, 0, 1),
        default=0.95,
        metavar="P",
        help="sample from the fewest tokens whose probabilities add up to P (0.95)",
    )
    parser.add_argument(
        "--seed", type=between(int, 0, 2**63 - 1), default=0, help="seed of the random choices (0)"
    )
    add_task(parser, "task of the text, if the model has a router per task")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation; returns the exit status."""
    trained = load_trained(args.path)
    require(trained, "causal", "to continue a text")
    require_task(trained, args.task)
    prompts = trained.tokenizer.encode_batch(args.prompts)
    longest, seen = max(map(len, prompts)), trained.config.data.sequence_length
    if longest + args.tokens > seen:
        print(
            f"warning: {longest} prompt tokens and {args.tokens} new ones exceed the {seen} tokens "
            f"that the model was trained on: it sees only the last {seen}",
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
        document_attention=trained.config.data.document_attention,
        task=args.task,
    )
    texts = list(args.prompts)
    print(texts[0], end="", flush=True)
    for prompt, text in stream_text(trained.tokenizer, drawn, prompts):
        texts[prompt] += text
        if prompt == 0:
            print(text, end="", flush=True)
    print()
    for text in texts[1:]:
        print(f"\n{text}")
    return 0
