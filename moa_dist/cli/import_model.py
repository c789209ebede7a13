"""`moa-dist import`: starts a run from a transformers model; see `moa_dist.transfer`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_dist.cli.arguments import add_overrides, utf8
from moa_dist.evaluate.export import CONFIG_FILE
from moa_dist.transfer.jetmoe_files import import_jetmoe
from moa_dist.units import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("format", choices=["jetmoe"], help="kind of model in the folder")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder that save_pretrained wrote"
    )
    parser.add_argument("output", type=Path, metavar="RUN", help="run folder to create")
    parser.add_argument(
        "--end-of-document",
        type=utf8,
        metavar="TOKEN",
        help="token of the folder's tokenizer that ends each document (<|endoftext|>, or the "
        "eos_token that tokenizer_config.json names)",
    )
    add_overrides(
        parser,
        f"settings of the new {CONFIG_FILE}, such as data.train=FOLDER; training takes them too",
    )


def run(args: argparse.Namespace) -> int:
    """Create the run and print how to train it; returns the exit status."""
    imported = import_jetmoe(args.folder, args.output, args.overrides, args.end_of_document)
    print(f"{args.output}: {short(imported.num_bytes)}B of weights, at step 0")
    if imported.without_tokenizer is not None:
        print(f"no tokenizer, which evaluation needs: {imported.without_tokenizer}")
    print(f"to train it: python launcher/train.py --config {args.output / CONFIG_FILE}", end="")
    given = any(override.startswith("data.train=") for override in args.overrides)
    print("" if given else " data.train=FOLDER")
    return 0
