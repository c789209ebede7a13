"""Lines of a budget that a reader can check: products of named factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

Factor = tuple[str, float]
"""A name, such as `tokens`, and a number."""


@dataclass(frozen=True)
class Term:
    """One line of a budget: `value` is the product of the factors."""

    name: str
    """What needs the memory."""
    factors: tuple[Factor, ...]
    """Factors; the last is a number of bytes, named `B`."""

    @cached_property
    def value(self) -> int:
        """Product of all factors, rounded."""
        return round(prod(number for _, number in self.factors))

    def times(self, name: str, number: float) -> Term:
        """Multiply by one more named factor."""
        return Term(self.name, ((name, number), *self.factors))

    @property
    def formula(self) -> str:
        """Text such as `tokens 8,192 x top_k 24 x d_model 1,536 x 2 B`."""
        return " x ".join(
            f"{_number(number)} B" if name == "B" else f"{name} {_number(number)}"
            for name, number in self.factors
        )


def term(name: str, *factors: Factor) -> Term:
    """Build a line from its factors."""
    return Term(name, factors)


def total(terms: list[Term]) -> int:
    """Add up all lines."""
    return sum(line.value for line in terms)


def _number(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.4g}"
