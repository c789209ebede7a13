"""How commands print results and report files that they cannot write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moa_dist.errors import DataError

Result = TypeVar("Result")


def print_result(result: Result, as_text: Callable[[Result], str], *, as_json: bool) -> None:
    """Print a result of JSON types, as JSON or as the text for people."""
    print(json.dumps(result, indent=2) if as_json else as_text(result), flush=True)


def not_written(output: Path, error: OSError) -> DataError:
    """Return the error of a command whose `--output` cannot be written."""
    return DataError(
        f"{output}: cannot be written: {error.strerror}; choose another place with --output"
    )
