"""Condenses a router's statistics to a few headline numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_dist.analyze.measures import chance_overlap, overlap, repeat_shares
from moa_dist.analyze.results import RouterResult

MOSTLY = 0.9
"""Share of an expert's load in one repeat from which it counts as specific to that repeat."""


@dataclass(frozen=True)
class Depth:
    """Describes how the repeats of a shared layer share its experts."""

    overlap: float
    """Share of a token's experts that another repeat reuses, averaged over pairs of repeats."""
    chance: float
    """The overlap expected at random: if each repeat chose by its loads alone."""
    single_repeat: float
    """Share of the used experts that get at least 90 % of their load in a single repeat."""
    distinct: float
    """Mean number of distinct experts that a token chose over all repeats."""
    most_distinct: int
    """Upper bound of `distinct`."""


@dataclass(frozen=True)
class Headline:
    """Summarizes one router over all repeats."""

    imbalance: float
    """Largest ratio of an expert's load to the mean load, in any repeat."""
    dead: int
    """Number of experts that no token chose in any repeat."""
    dropped: float
    """Share of choices dropped for lack of capacity."""
    explained: float
    """How far token identity explains the choice of experts, from 0 (not at all) to 1
    (completely), over frequent tokens."""
    depth: Depth | None
    """How repeats share experts; None for a layer that is applied once."""


def headline(router: RouterResult) -> Headline:
    """Compute the headline numbers of one router."""
    load_RE = router.load_RE
    mean_R = np.maximum(load_RE.mean(1), 1e-9)
    return Headline(
        imbalance=float((load_RE.max(1) / mean_R).max()),
        dead=int((load_RE.sum(0) == 0).sum()),
        dropped=float(np.sum(router.dropped) / max(load_RE.sum(), 1)),
        explained=router.information / max(router.most_information, 1e-9),
        depth=_depth(router) if router.num_repeats > 1 else None,
    )


def _depth(router: RouterResult) -> Depth:
    common_RR = np.array(router.common)
    others = ~np.eye(router.num_repeats, dtype=bool)
    by_chance_RR = chance_overlap(router.load_RE, router.num_tokens, router.choices)
    shares_RE = repeat_shares(router.load_RE)
    largest_E = shares_RE.max(0)
    used = np.isfinite(largest_E)
    counts = np.array(router.distinct)
    return Depth(
        overlap=float(overlap(common_RR, router.num_tokens, router.choices)[others].mean()),
        chance=float(by_chance_RR[others].mean()),
        single_repeat=float((largest_E[used] >= MOSTLY).sum() / max(used.sum(), 1)),
        distinct=float((counts * np.arange(len(counts))).sum() / max(counts.sum(), 1)),
        most_distinct=len(counts) - 1,
    )
