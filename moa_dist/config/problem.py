"""A problem with a configuration, before it is known who wrote the value."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """What is wrong and what to do, naming the fields by dotted path."""

    text: str
    """The message."""
    paths: tuple[str, ...]
    """Dotted paths whose sources the message should cite."""
