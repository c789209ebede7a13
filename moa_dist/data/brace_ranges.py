"""Expands brace ranges, such as `shards-{00000..00099}.tar`, and names what is missing of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from braceexpand import braceexpand

from moa_dist.errors import DataError

_MOST = 1_000_000
_MOST_NAMED = 5


def has_braces(name: str) -> bool:
    """Return whether a name stands for several."""
    return "{" in name


def expand(name: str) -> list[str]:
    """Return the names that one with `{00..99}` or `{a,b}` stands for.

    Raises:
        DataError: the braces are not closed, or stand for more than a million names.
    """
    try:
        names = list(islice(braceexpand(name), _MOST + 1))
    except ValueError as error:
        raise DataError(
            f"{name}: braces that are not closed; write {{00000..00099}}", key=name
        ) from error
    if len(names) > _MOST:
        raise DataError(f"{name}: stands for more than {_MOST:,} files; check the range", key=name)
    return names


def require_all(name: str, names: Sequence[str], missing: Sequence[str]) -> None:
    """Raise DataError if files are missing of those that `name` stands for."""
    if not missing:
        return
    more = f" and {len(missing) - _MOST_NAMED:,} more" if len(missing) > _MOST_NAMED else ""
    raise DataError(
        f"{name}: {len(missing):,} of {len(names):,} files are missing: "
        f"{', '.join(missing[:_MOST_NAMED])}{more}; copy them, or change the range",
        key=name,
    )
