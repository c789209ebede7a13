"""`moa-dist import`: a run that starts from a model of transformers; see `moa_dist.transfer`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_dist.evaluate.export import CONFIG_FILE
from moa_dist.transfer.jetmoe_files import import_jetmoe
from moa_dist.units import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("format", choices=["jetmoe"], help="what the folder holds")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="that save_pretrained has written"
    )
    parser.add_argument("output", type=Path, metavar="RUN", help="the run's folder, to be made")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help=f"settings of its {CONFIG_FILE}, such as data.train=FOLDER; training takes them too",
    )


def run(args: argparse.Namespace) -> int:
    """Make the run and say how to go on; returns the exit status."""
    imported = import_jetmoe(args.folder, args.output, args.overrides)
    print(f"{args.output}: {short(imported.num_bytes)}B of weights, at step 0")
    if imported.without_tokenizer is not None:
        print(f"without a tokenizer, by which to evaluate: {imported.without_tokenizer}")
    print(f"to train it: python launcher/train.py --config {args.output / CONFIG_FILE}", end="")
    given = any(override.startswith("data.train=") for override in args.overrides)
    print("" if given else " data.train=FOLDER")
    return 0
