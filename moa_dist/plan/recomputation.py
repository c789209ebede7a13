"""Chooses what a layout computes again so that it fits into memory, at the least extra time.

Bytes are those of `moa_dist.plan.activations`, seconds those of `moa_dist.plan.time`. There are few
choices, so all of them are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from moa_dist.config.parts import PARTS
from moa_dist.config.recompute import Recompute
from moa_dist.config.run import Config


class Cost(NamedTuple):
    """What a layout needs with some recomputation."""

    num_bytes: int
    """Memory of a rank at its peak."""
    seconds: float
    """Time of a step."""


@dataclass(frozen=True)
class Choice:
    """The recomputation of a layout, and why no cheaper one."""

    recompute: Recompute
    """What is computed again: the cheapest that fits, or the smallest if none does."""
    costs: dict[Recompute, Cost]
    """What was compared, by time."""
    memory: int
    """Bytes available."""

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.costs[self.recompute].num_bytes <= self.memory

    def __str__(self) -> str:
        """Say in a sentence what it saves and costs, and by how much cheaper ones do not fit."""
        plain, own = self.costs[False], self.costs[self.recompute]
        slower = own.seconds - plain.seconds
        what = f"train.recompute={recompute_name(self.recompute)}"
        gained = (
            f"{_gib(plain.num_bytes - own.num_bytes)} less for {slower * 1e3:,.1f} ms a step "
            f"({slower / plain.seconds:.1%})"
        )
        if not self.fits:
            needed = _gib(own.num_bytes - self.memory)
            return f"nothing fits: {what}, with {gained}, needs {needed} too much"
        if not self.recompute:
            return f"{what} fits: {_gib(self.memory - own.num_bytes)} are free"
        cheaper = [
            f"{recompute_name(other)} by {_gib(cost.num_bytes - self.memory)}"
            for other, cost in self.costs.items()
            if cost.seconds <= own.seconds and cost.num_bytes > self.memory
        ]
        return f"{what}: {gained}; of those that cost less, none fits: {', '.join(cheaper)}"


def choose(options: list[Recompute], cost_of: Callable[[Recompute], Cost], memory: int) -> Choice:
    """Choose one of `options`; if recomputing nothing, which is one of them, fits, that is it."""
    plain = cost_of(False)
    if plain.num_bytes <= memory:
        return Choice(False, {False: plain}, memory)
    costs = {option: plain if option is False else cost_of(option) for option in options}
    costs = dict(sorted(costs.items(), key=lambda item: item[1].seconds))
    fitting = (option for option, cost in costs.items() if cost.num_bytes <= memory)
    smallest = min(costs, key=lambda option: costs[option].num_bytes)
    return Choice(next(fitting, smallest), costs, memory)


def recompute_options(config: Config) -> list[Recompute]:
    """List all that a run can recompute and that differs: parts of layers, and whole layers."""
    return [False] if config.train.compile else [False, *_parts(config), True]


def _parts(config: Config) -> Iterator[Recompute]:
    routed = config.model.routed_parts()
    for num_parts in range(len(PARTS) + 1):
        for parts in combinations(PARTS, num_parts):
            if parts:
                yield parts
            if any(part not in parts for part in routed):  # a part recomputes its experts too
                yield (*parts, "experts")


def recompute_name(recompute: Recompute) -> str:
    """Format a value of `train.recompute` as in an override."""
    if isinstance(recompute, bool):
        return str(recompute).lower()
    return f"[{','.join(recompute)}]"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
