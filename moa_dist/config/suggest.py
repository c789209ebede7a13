"""Numbers near a wrong one that would work, and how a message lists them."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """Return the divisors up to 4096: searching further would take long and help nobody."""
    return [d for d in range(1, min(number, 4096) + 1) if number % d == 0]


def nearest(number: int, candidates: Iterable[int]) -> list[int]:
    """Return the closest candidate on either side."""
    ordered = sorted(candidates)
    below = [c for c in ordered if c <= number][-1:]
    return below + [c for c in ordered if c > number][:1]


def multiples_near(number: int, step: int) -> list[int]:
    """Return the positive multiples of `step` on either side."""
    below = number // step * step
    return [m for m in (below, below + step) if m > 0]


def one_of(values: list[int]) -> str:
    """Join as `1, 2 or 4`."""
    *rest, last = map(str, values)
    return f"{', '.join(rest)} or {last}" if rest else last
