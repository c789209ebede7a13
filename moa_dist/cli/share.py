"""`moa-dist share`: starts a run with shared layers from a run without; see `transfer.share`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.format import read_model, tokenizer_of
from moa_dist.cli.arguments import add_overrides
from moa_dist.config import load_config
from moa_dist.config.run import run_folder
from moa_dist.errors import ConfigError
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.transfer.new_run import write_new_model
from moa_dist.transfer.share import STARTS, problems_of, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run whose layers are all distinct (its newest checkpoint is used), or checkpoint",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML configuration of the run to create; training with the same configuration "
        "continues from it",
    )
    parser.add_argument(
        "--start",
        choices=STARTS,
        default="average",
        help="what a shared weight starts from: the mean over the layers that share it, or one "
        "layer of the source, taken at even steps (stepwise), from the first or from the last ones",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Create the run and print how close adapters come; returns the exit status."""
    config = load_config(args.config, args.overrides)
    checkpoint = find_checkpoint(args.source)
    require_valid(checkpoint)
    source, index = read_model(checkpoint)
    if problems := list(problems_of(index.config.model, config.model)):
        raise ConfigError(problems, f"{args.config} from {checkpoint}")
    shared = share(source, config.model, args.start, seed=config.train.seed)
    target = run_folder(config)
    write_new_model(target, config, shared.model, tokenizer_of(checkpoint))
    if shared.explained is not None:
        print(f"adapters: {shared.explained:.0%} of what the layers differ by (squared)")
    print(f"{target}: created at step 0 from {checkpoint}; train it with the same configuration")
    return 0
