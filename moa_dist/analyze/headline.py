"""The few numbers about a router that are worth reading first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_dist.analyze.measures import chance_overlap, overlap, repeat_shares
from moa_dist.analyze.results import RouterResult

MOSTLY = 0.9
"""From this share of its load on, an expert counts as one of a single repeat."""


@dataclass(frozen=True)
class Depth:
    """How the repeats of a shared layer share its experts."""

    overlap: float
    """Share of a token's experts that it chose in another repeat, too; mean over pairs."""
    chance: float
    """What it would be if each repeat chose by its loads alone, without regard to the token."""
    single_repeat: float
    """Share of the used experts whose load comes from one repeat, all but a tenth."""
    distinct: float
    """Different experts that a token chose over all repeats, mean."""
    most_distinct: int
    """The most that it could be."""


@dataclass(frozen=True)
class Headline:
    """About one router, over all repeats."""

    imbalance: float
    """The fullest expert's load in relation to the mean: the worst repeat."""
    dead: int
    """Experts that no token chose in any repeat."""
    dropped: float
    """Share of choices that capacity left no room for."""
    explained: float
    """What the token's identity tells of its experts, 0 if nothing and 1 if it determines them;
    over frequent tokens."""
    depth: Depth | None
    """None for a layer that is applied once."""


def headline(router: RouterResult) -> Headline:
    """Summarise one router."""
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
