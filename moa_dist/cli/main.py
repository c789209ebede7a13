"""`moa-dist`: one command, its parts loaded only when chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from moa_dist import __version__
from moa_dist.errors import MoaDistError

COMMANDS = {
    "prepare": ("moa_dist.cli.prepare", "turn text into shards of tokens"),
    "config": ("moa_dist.cli.config", "show, check or explain a configuration"),
    "recipes": ("moa_dist.cli.recipes", "list the papers' models, with sizes and what to expect"),
    "plan": ("moa_dist.cli.plan", "count parameters, operations and memory before training"),
    "verify": ("moa_dist.cli.verify", "compare a layout, on its machines, with one process"),
    "doctor": ("moa_dist.cli.doctor", "look for faults of this machine, or of a job's ranks"),
    "bench": ("moa_dist.cli.bench", "measure speed and memory, against dense models and peers"),
    "eval": ("moa_dist.cli.evaluate", "measure a trained model"),
    "analyze": ("moa_dist.cli.analyze", "show what a trained model's experts and heads do"),
    "hang": ("moa_dist.cli.hang", "ask a running job which rank waits for what"),
    "report": ("moa_dist.cli.report", "write a page of curves about a run, or compare several"),
    "checkpoint": ("moa_dist.cli.checkpoint", "show, verify or rewrite what a run has saved"),
    "export": ("moa_dist.cli.export", "write a trained model for us or for transformers"),
    "import": ("moa_dist.cli.import_model", "make a run from a model of transformers"),
    "upcycle": ("moa_dist.cli.upcycle", "make a run with experts from a dense one"),
    "translate": ("moa_dist.cli.translate", "translate a file with a trained model"),
    "generate": ("moa_dist.cli.generate", "continue a text with a trained model"),
}
"""Name -> module with `add_arguments(parser)` and `run(args)`, and its line in the help."""


class Command(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 for what the user can mend)."""
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except MoaDistError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141  # as a process that the pipe's signal ends


def _reader_is_gone() -> bool:
    """Whether stdout goes to a pipe that nobody reads any more, such as that of `head`."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # for what Python still writes when it ends
    return True


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="moa-dist",
        description="Train Transformers whose attention and feed-forward layers are experts. "
        "Training itself is started with launcher/train.py.",
    )
    parser.add_argument("--version", action="version", version=f"moa-dist {__version__}")
    # The deepspeed launcher puts it first, before the subcommand.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    command: Command | None = None
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        # The others stay unloaded: checking a configuration should not wait for torch.
        if name == chosen:
            command = cast(Command, importlib.import_module(module))
            command.add_arguments(subparser)
    args = _parse(parser, argv)
    assert command is not None, "argparse refuses an unknown or missing subcommand"
    return command.run(args)


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Like `parse_args`, but `key=value` may also stand after options, as it may before them.

    argparse has `parse_intermixed_args` for this, but not for parsers with subcommands.
    """
    args, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if not hasattr(args, "overrides") or len(late) < len(rest):
        return parser.parse_args(argv)  # which says what is wrong, if anything is
    args.overrides += late
    return args


if __name__ == "__main__":
    sys.exit(main())
