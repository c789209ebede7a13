"""`moa-dist upcycle`: starts a run with experts from dense runs; see `transfer.upcycle`."""

from __future__ import annotations

import argparse
from pathlib import Path

from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.format import read_model, tokenizer_of
from moa_dist.cli.arguments import add_overrides
from moa_dist.config import load_config
from moa_dist.config.run import run_folder
from moa_dist.errors import ConfigError, DataError
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.transfer.new_run import write_new_model
from moa_dist.transfer.upcycle import upcycle
from moa_dist.transfer.upcycle_checks import problems_of


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
    parser.add_argument(
        "--with",
        dest="others",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        action="append",
        default=[],
        help="another dense run; experts come from all runs in turn, and everything else is their "
        "mean. Repeatable",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Create the run and print where each part came from; returns the exit status."""
    config = load_config(args.config, args.overrides)
    checkpoints = [find_checkpoint(run) for run in (args.dense, *args.others)]
    for checkpoint in checkpoints:
        require_valid(checkpoint)
    if len({_tokenizer(checkpoint) for checkpoint in checkpoints}) > 1:
        raise DataError("the dense runs have different tokenizers; train them with one")
    dense, *others = (read_model(checkpoint) for checkpoint in checkpoints)
    configs = [index.config.model for _, index in (dense, *others)]
    if problems := list(problems_of(configs[0], config.model, configs[1:])):
        raise ConfigError(problems, f"{args.config} from {checkpoints[0]}")
    other_models = [model for model, _ in others]
    model, parts = upcycle(dense[0], config.model, others=other_models, seed=config.train.seed)
    target = run_folder(config)
    write_new_model(target, config, model, tokenizer_of(checkpoints[0]))
    for part in parts:
        print(f"{part.name}: {part.how}")
    sources = ", ".join(map(str, checkpoints))
    print(f"{target}: created at step 0 from {sources}; train it with the same configuration")
    return 0


def _tokenizer(checkpoint: Path) -> bytes | None:
    path = tokenizer_of(checkpoint)
    return path.read_bytes() if path.exists() else None
