"""Interleaves several sources by weight: a pure function of (weights, readers, index).

Every reader has a stream of samples of its own (see `order`): sample g is the sample g // M of
reader g mod M. It interleaves the sources independently of the other readers, so a rank that owns
it reads its shards of every source and no others. One split at a time: of the first t samples of a
stream, a source of share w gets

    floor(w t + p)

and the next source takes its share of those that are left. The phases p, from 0 to 1, differ
between readers and splits: multiples of irrational numbers, which spread evenly, so the rounding of
the readers cancels out. However many samples have been consumed, those from one source deviate from
its exact share by two or three with two sources, and with many by about the square root of the
number of readers. All arithmetic is on integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count
from math import isqrt

_ONE = 1 << 32
"""Phases are multiples of 1 / 2^32."""


@dataclass(frozen=True)
class Interleaving:
    """Assigns every sample of a reader's endless stream to a source, by weight."""

    weights: Mapping[str, float]
    """Source -> weight; at least one is above 0. Decimal fractions are exact: 0.7 is 7/10."""

    def locate(self, reader: int, sample: int) -> tuple[str, int]:
        """Return the source of a reader's sample, and its index among those from that source."""
        left = sample
        for name, share, phase in self._splits(reader):
            taken = _rounded(share, left, phase)
            if _rounded(share, left + 1, phase) > taken:
                return name, taken
            left -= taken
        raise AssertionError("the last source takes all that is left")

    def counts(self, reader: int, samples: int) -> dict[str, int]:
        """Return how many of a reader's first `samples` samples come from each source."""
        counts = dict.fromkeys(self.weights, 0)
        left = samples
        for name, share, phase in self._splits(reader):
            counts[name] = _rounded(share, left, phase)
            left -= counts[name]
        return counts

    def _splits(self, reader: int) -> Iterator[tuple[str, Fraction, int]]:
        """Yield the sources with weight, their shares of what is left, and the reader's phases."""
        for (name, share), step in self._shares:
            yield name, share, reader * step % _ONE

    @cached_property
    def _shares(self) -> list[tuple[tuple[str, Fraction], int]]:
        weights = {name: Fraction(repr(weight)) for name, weight in self.weights.items() if weight}
        left, shares = sum(weights.values()), []
        for name, weight in weights.items():
            shares.append((name, weight / left))
            left -= weight
        return list(zip(shares, _irrational_steps(), strict=False))


def _rounded(share: Fraction, samples: int, phase: int) -> int:
    numerator, denominator = share.numerator, share.denominator
    return (numerator * samples * _ONE + phase * denominator) // (denominator * _ONE)


def _irrational_steps() -> Iterator[int]:
    """Yield the fractional parts of the square roots of primes, in units of 2^-32."""
    for number in count(2):
        if all(number % divisor for divisor in range(2, isqrt(number) + 1)):
            yield isqrt(number * _ONE * _ONE) % _ONE
