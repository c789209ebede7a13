"""Types of command-line arguments that argparse lacks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def between(
    kind: Callable[[str], Number], low: float, high: float = math.inf
) -> Callable[[str], Number]:
    """Argument type: a number from `low` to `high`, both included, but never infinite."""

    def number(text: str) -> Number:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}")
        return value

    return number


def utf8(text: str) -> str:
    """Argument type: text that was valid UTF-8 when it was typed."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is not valid UTF-8") from error
    return text
