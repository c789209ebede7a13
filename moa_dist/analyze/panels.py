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
    axes: tuple[str, str]
    """What rows and columns are."""
    rows: list[str]
    """Label of each row."""
    columns: list[str]
    """Label of each column."""
    quantity: str
    """What the values are, with their unit."""
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
            "their repeats (R), and lines separate heads with experts of their own",
            list(_loads(routers)),
        ),
        Plate(
            "depth",
            "Which repeats use an expert",
            "Share of each expert's load in each repeat; an even share is the middle of the color "
            "scale; experts ordered by mean repeat, blank if never chosen",
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
            "Pointwise mutual information of two experts, over tokens that choose both; experts of "
            "shared layers ordered by mean repeat, blank if never chosen",
            [_together(router) for router in routers if router.choices > 1],
        ),
        Plate(
            "heads",
            "Where heads look",
            "Means over queries; in MoA, each expert has its own heads, and only tokens that "
            "choose the expert count",
            list(_heads(analysis.attention)),
        ),
        Plate(
            "halting",
            "Applications per token",
            "Share of tokens by the number of applications that they take of the layers that "
            "tokens leave",
            list(_depths(analysis.depths)),
        ),
    ]
    return [plate for plate in made if plate.panels]


def _depths(depths: dict[str, list[int]]) -> Iterator[Panel]:
    """Yield one panel with a row for each text, if tokens halt."""
    if depths:
        tokens_RC = np.array(list(depths.values()), dtype=np.float64)
        yield Panel(
            title="",
            values_RC=tokens_RC / np.maximum(tokens_RC.sum(1, keepdims=True), 1),
            axes=("text", "applications"),
            rows=list(depths),
            columns=[str(number) for number in range(tokens_RC.shape[1])],
            quantity="share of tokens",
            low=0.0,
            high=1.0,
        )


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
        yield Panel(
            title=name,
            values_RC=relative_RE,
            axes=("layer and repeat", "expert"),
            rows=rows,
            columns=_numbers(num_experts),
            quantity="load / mean",
            low=0.0,
            high=2.0,
            has_middle=True,
            num_groups=num_groups,
        )


def _depth(router: RouterResult) -> Panel:
    order = depth_order(router.load_RE)
    return Panel(
        title=router_title(router),
        values_RC=repeat_shares(router.load_RE)[:, order],
        axes=("repeat", "expert, early to late"),
        rows=_repeats(router),
        columns=[str(expert) for expert in order],
        quantity="share of the expert's load",
        low=0.0,
        high=2 / router.num_repeats,
        has_middle=True,
    )


def _overlap(router: RouterResult) -> Panel:
    return Panel(
        title=router_title(router),
        values_RC=overlap(np.array(router.common), router.num_tokens, router.choices),
        axes=("repeat", "repeat"),
        rows=_repeats(router),
        columns=_repeats(router),
        quantity="share of experts",
        low=0.0,
        high=1.0,
    )


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
    return Panel(
        title=router_title(router),
        values_RC=pmi_EE,
        axes=("expert", "expert"),
        rows=labels,
        columns=labels,
        quantity="PMI, nats",
        low=-1.0,
        high=1.0,
        has_middle=True,
    )


def _heads(layers: list[LayerHeads]) -> Iterator[Panel]:
    if not layers:
        return
    shares = {
        "previous": "attention to the previous token",
        "first": "attention to the first token",
        "itself": "attention to the token itself",
    }
    layers = sorted(layers, key=lambda layer: (layer.layer, layer.repeat, layer.attention))

    def panel(name: str, title: str, quantity: str, scale: tuple[float, float]) -> Panel:
        return Panel(
            title=title,
            values_RC=_grid(layers, name),
            axes=("layer and repeat", "head"),
            rows=[layer.title for layer in layers],
            columns=_numbers(len(layers[0].heads)),
            quantity=quantity,
            low=scale[0],
            high=scale[1],
        )

    for name, title, unit in (
        ("distance", "mean distance", "tokens"),
        ("entropy", "entropy", "nats"),
    ):
        yield panel(name, title, unit, _range(_grid(layers, name)))
    # One scale for one quantity, so that the pictures can be compared.
    _, most = _range(np.stack([_grid(layers, name) for name in shares]))
    for name, title in shares.items():
        yield panel(name, title, "share of attention", (0.0, most))


def _grid(layers: list[LayerHeads], name: str) -> NDArray[np.float64]:
    """Return a measure of every head of every layer, [R, C]."""
    return np.array([[_value(head, name) for head in layer.heads] for layer in layers])


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the smallest and the largest known value, which differ."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    return low, max(high, low + 1e-6)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _value(head: HeadResult, name: str) -> float:
    return float(getattr(head, name)) if head.queries else math.nan
