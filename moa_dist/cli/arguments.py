"""Types of command-line arguments that argparse lacks, and arguments that commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


def between(
    kind: Callable[[str], Number], low: float, high: float = math.inf
) -> Callable[[str], Number]:
    """Return an argument type: a finite number from `low` to `high`, both included."""

    def number(text: str) -> Number:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}")
        return value

    return number


def utf8(text: str) -> str:
    """Argument type: text that is valid UTF-8.

    Raises ArgumentTypeError for bytes that the shell passed on although they are not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is not valid UTF-8") from error
    return text


def add_task(parser: argparse.ArgumentParser, help_line: str) -> None:
    """Declare `--task`."""
    parser.add_argument("--task", type=between(int, 0), metavar="N", help=help_line)


def add_json(parser: argparse.ArgumentParser, help_line: str = "print JSON") -> None:
    """Declare `--json`."""
    parser.add_argument("--json", action="store_true", help=help_line)


def add_overrides(parser: argparse.ArgumentParser, help_line: str = "settings to change") -> None:
    """Declare `overrides`, any number of `key=value`, which may also follow options."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_line)


def add_model_path(parser: argparse.ArgumentParser, *, with_exports: bool = True) -> None:
    """Declare `path`, the trained model that a command works on."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder (its newest checkpoint is used), checkpoint"
        + (", average, or export" if with_exports else ""),
    )
