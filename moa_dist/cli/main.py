"""Entry point of `moa-dist`, which imports a subcommand only when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from moa_dist import __version__
from moa_dist.errors import ExitCode, MoaDistError, refused_paths_named

COMMANDS = {
    "prepare": ("moa_dist.cli.prepare", "turn text into token shards"),
    "config": ("moa_dist.cli.config", "show, check or explain a configuration"),
    "recipes": (
        "moa_dist.cli.recipes",
        "list the papers' models with their sizes and expected results",
    ),
    "plan": ("moa_dist.cli.plan", "count parameters, operations and memory before training"),
    "verify": (
        "moa_dist.cli.verify",
        "check that a parallel layout takes the same steps as one process",
    ),
    "doctor": ("moa_dist.cli.doctor", "diagnose this machine, the hosts of a job, or its ranks"),
    "bench": (
        "moa_dist.cli.bench",
        "measure speed and memory against dense models and other packages",
    ),
    "eval": ("moa_dist.cli.evaluate", "evaluate a trained model"),
    "analyze": ("moa_dist.cli.analyze", "show what a trained model's experts and heads do"),
    "hang": ("moa_dist.cli.hang", "show which rank of a running job blocks it, and where"),
    "report": ("moa_dist.cli.report", "write an HTML page about a run, or compare several"),
    "checkpoint": ("moa_dist.cli.checkpoint", "show, verify, convert or average checkpoints"),
    "export": ("moa_dist.cli.export", "export a trained model to our format or Hugging Face's"),
    "import": ("moa_dist.cli.import_model", "start a run from a transformers model"),
    "upcycle": ("moa_dist.cli.upcycle", "start a run with experts from a dense run"),
    "share": ("moa_dist.cli.share", "start a run with shared layers from a run without"),
    "translate": ("moa_dist.cli.translate", "translate a file with a trained model"),
    "generate": ("moa_dist.cli.generate", "continue a text with a trained model"),
}
"""Module, with `add_arguments(parser)` and `run(args)`, and help line of each subcommand."""


class Command(Protocol):
    """The functions that the module of a subcommand has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommand's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the subcommand; returns the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status, see `ExitCode`."""
    try:
        with refused_paths_named():
            status = _run(sys.argv[1:] if argv is None else list(argv))
            sys.stdout.flush()
            return status
    except MoaDistError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141  # the status of a process that SIGPIPE kills


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe whose reader, such as `head`, has exited."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python still flushes when it exits
    return True


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="moa-dist",
        description="Train Transformers whose attention and feed-forward layers are mixtures of "
        "experts. To start training itself, run launcher/train.py.",
    )
    parser.add_argument("--version", action="version", version=f"moa-dist {__version__}")
    # The deepspeed launcher inserts it before the subcommand.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    command: Command | None = None
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        # Other modules stay unloaded: checking a configuration should not wait for torch.
        if name == chosen:
            command = cast(Command, importlib.import_module(module))
            command.add_arguments(subparser)
    args = _parse(parser, argv)
    assert command is not None, "argparse rejects an unknown or missing subcommand"
    return command.run(args)


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse arguments, accepting overrides after options as well as before them.

    argparse offers `parse_intermixed_args` for this, but not to parsers with subcommands.
    """
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides") or any(text.startswith("-") for text in rest):
        return parser.parse_args(argv)  # reports what is wrong, if anything is
    args.overrides += rest
    return args


if __name__ == "__main__":
    sys.exit(main())
