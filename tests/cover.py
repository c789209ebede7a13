"""Choosing few cells of a product so that any two (or three) values still meet in one of them."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

Cell = dict[str, Any]
"""A value for every dimension."""


def covering(cells: Sequence[Cell], strength: int = 2) -> list[int]:
    """Indices of cells that hold every tuple of `strength` values that any of `cells` holds.

    Greedy: takes the cell that adds most, the first of several, until none adds any.
    """
    held = [set(_tuples(cell, strength)) for cell in cells]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cells)), key=lambda i: len(held[i] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)


def _tuples(cell: Cell, strength: int) -> Iterator[frozenset[tuple[str, str]]]:
    values = [(name, repr(value)) for name, value in cell.items()]
    return map(frozenset, combinations(values, min(strength, len(values))))
