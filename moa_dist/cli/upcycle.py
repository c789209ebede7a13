"""`moa-dist upcycle`: starts a run with experts from a dense run; see `transfer.upcycle`."""

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
from moa_dist.transfer.upcycle import problems_of, upcycle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "dense",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="dense run (its newest checkpoint is used) or checkpoint",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML configuration of the run to create; training with the same configuration "
        "continues from it",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Create the run and print where each part came from; returns the exit status."""
    config = load_config(args.config, args.overrides)
    checkpoint = find_checkpoint(args.dense)
    require_valid(checkpoint)
    dense, index = read_model(checkpoint)
    if problems := list(problems_of(index.config.model, config.model)):
        raise ConfigError(problems, f"{args.config} from {checkpoint}")
    model, parts = upcycle(dense, config.model, seed=config.train.seed)
    target = run_folder(config)
    write_new_model(target, config, model, tokenizer_of(checkpoint))
    for part in parts:
        print(f"{part.name}: {part.how}")
    print(f"{target}: created at step 0 from {checkpoint}; train it with the same configuration")
    return 0
