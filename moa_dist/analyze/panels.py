"""Prepares the plots of an analysis for any renderer: grids of values with labels.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moa_dist.analyze.measures import depth_order, overlap, pair_information, repeat_shares
from moa_dist.analyze.results import Analysis, HeadResult, LayerHeads, RouterResult

MOST_PAIRED = 96
"""Maximum number of experts in a plot of pairs; if there are more, the most used ones."""


@dataclass(frozen=True)
class Panel:
    """Holds one grid of values."""

    title: str
    values_RC: NDArray[np.float64]
    """Values; NaN is left blank."""
    rows: list[str]
    """Label of each row."""
    columns: tuple[str, str]
    """Labels of the first and the last column."""
    low: float
    high: float
    """Ends of the color scale; values outside are clipped."""
    has_middle: bool = False
    """Whether colors diverge from the middle of the scale, instead of running from low to high."""
    num_groups: int = 1
    """Number of equal groups that columns are divided into."""


@dataclass(frozen=True)
class Plate:
    """Holds all panels of one kind, which make up one plot."""

    name: str
    """Stem of the plot's file name."""
    title: str
    about: str
    panels: list[Panel]


def plates(analysis: Analysis) -> list[Plate]:
    """Build all plots of an analysis that have something to show."""
    routers = analysis.routers
    repeated = [router for router in routers if router.num_repeats > 1]
    made = [
        Plate(
            "load",
            "Load of every expert",
            "Relative to the mean, which is the middle of the color scale; rows are layers (L) and "
            "their repeats (R)",
            list(_loads(routers)),
        ),
        Plate(
            "depth",
            "Which repeats use an expert",
            "Share of each expert's load in each repeat; an even share is the middle of the color "
            "scale; experts ordered by mean repeat",
            [_depth(router) for router in repeated],
        ),
        Plate(
            "overlap",
            "Experts reused across repeats",
            "Share of a token's experts in one repeat that it also chooses in another",
            [_overlap(router) for router in repeated],
        ),
        Plate(
            "together",
            "Experts chosen together",
            "Pointwise mutual information of two experts, from -1 to 1 nats, over tokens that "
            "choose both; experts of shared layers ordered by mean repeat",
            [_together(router) for router in routers if router.choices > 1],
        ),
        Plate(
            "heads",
            "Where heads look",
            "Means over queries; in MoA, each expert has its own heads, and only tokens that "
            "choose the expert count",
            list(_heads(analysis.attention)),
        ),
    ]
    return [plate for plate in made if plate.panels]


def router_title(router: RouterResult) -> str:
    """Return a title such as `L0 ffn`."""
    return f"L{router.layer} {router.router}"


def _repeats(router: RouterResult) -> list[str]:
    return [f"R{repeat}" for repeat in range(router.num_repeats)]


def _loads(routers: list[RouterResult]) -> Iterator[Panel]:
    """Yield a panel per router name, or several if routers of one name differ in shape."""
    kinds = dict.fromkeys((r.router, r.num_experts, r.num_groups) for r in routers)
    for name, num_experts, num_groups in kinds:
        alike = [
            r
            for r in routers
            if (r.router, r.num_experts, r.num_groups) == (name, num_experts, num_groups)
        ]
        load_RE = np.concatenate([router.load_RE for router in alike])
        relative_RE = load_RE / np.maximum(load_RE.mean(1, keepdims=True), 1e-9)
        rows = [f"L{router.layer} {repeat}" for router in alike for repeat in _repeats(router)]
        columns = ("expert 0", str(num_experts - 1))
        yield Panel(
            name, relative_RE, rows, columns, 0.0, 2.0, has_middle=True, num_groups=num_groups
        )


def _depth(router: RouterResult) -> Panel:
    shares_RE = repeat_shares(router.load_RE)[:, depth_order(router.load_RE)]
    columns = ("early experts", "late experts")
    high = 2 / router.num_repeats
    rows = _repeats(router)
    return Panel(router_title(router), shares_RE, rows, columns, 0.0, high, has_middle=True)


def _overlap(router: RouterResult) -> Panel:
    shares_RR = overlap(np.array(router.common), router.num_tokens, router.choices)
    rows = _repeats(router)
    return Panel(router_title(router), shares_RR, rows, (rows[0], rows[-1]), 0.0, 1.0)


def _together(router: RouterResult) -> Panel:
    load_E = router.load_RE.sum(0)
    most_used = np.argsort(-load_E, kind="stable")[:MOST_PAIRED]
    order = depth_order(router.load_RE)
    order = order[np.isin(order, most_used)]
    pmi_EE = pair_information(np.array(router.together), router.num_tokens * router.num_repeats)
    pmi_EE = pmi_EE[np.ix_(order, order)]
    np.fill_diagonal(pmi_EE, np.nan)
    pmi_EE[:, load_E[order] == 0] = np.nan
    pmi_EE[load_E[order] == 0] = np.nan
    labels = [str(expert) for expert in order]
    columns = (f"expert {labels[0]}", labels[-1])
    return Panel(router_title(router), pmi_EE, labels, columns, -1.0, 1.0, has_middle=True)


def _heads(layers: list[LayerHeads]) -> Iterator[Panel]:
    if not layers:
        return
    measures = (
        ("distance", "mean distance, tokens"),
        ("entropy", "entropy, nats"),
        ("previous", "attention to the previous token"),
        ("first", "attention to the first token"),
        ("itself", "attention to the token itself"),
    )
    rows = [layer.title for layer in layers]
    last = str(len(layers[0].heads) - 1)
    for name, title in measures:
        values_RC = np.array([[_value(head, name) for head in layer.heads] for layer in layers])
        known = values_RC[np.isfinite(values_RC)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        yield Panel(title, values_RC, rows, ("head 0", last), low, max(high, low + 1e-6))


def _value(head: HeadResult, name: str) -> float:
    return float(getattr(head, name)) if head.queries else math.nan
