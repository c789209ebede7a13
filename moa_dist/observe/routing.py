"""What a router's counts say, as numbers and as pictures.

Shapes: G router groups (heads in SwitchHead, else 1), E experts per router group.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from moa_dist.models.stack import RouterCall
from moa_dist.moe.statistics import RoutingReport

_CELL = (8, 4)
"""Height and width in pixels of one expert in a heatmap."""


def router_call_name(call: RouterCall) -> str:
    """Such as `layer0.repeat1.ffn`; layers of one repeat count as repeat 0."""
    return f"layer{call.layer}.repeat{call.repeat}.{call.router}"


def router_call_of(name: str) -> RouterCall | None:
    """What `router_call_name` names; None if it names nothing."""
    found = re.fullmatch(r"layer(\d{1,9})\.repeat(\d{1,9})\.(.+)", name)
    return RouterCall(int(found[1]), int(found[2]), found[3]) if found else None


def drop_share(report: RoutingReport) -> float:
    """Share of assignments dropped for lack of capacity."""
    return report.dropped.sum().item() / max(report.load.sum().item(), 1)


def overall_drop_share(routing: dict[RouterCall, RoutingReport]) -> float:
    """The same over all routers together."""
    dropped = sum(report.dropped.sum().item() for report in routing.values())
    return dropped / max(sum(report.load.sum().item() for report in routing.values()), 1)


def routing_summary(report: RoutingReport) -> dict[str, float]:
    """Four numbers about one application of a router."""
    load = report.load.double()
    entropy, pairs = report.entropy.tolist()
    return {
        "drop_share": drop_share(report),
        # nats per token, mean over router groups
        "entropy": entropy / max(pairs, 1),
        # Every router group makes as many choices, so one mean serves all of them.
        "load_imbalance": load.max().item() / (load.mean().item() or 1.0),
        "dead_experts": float((load == 0).sum().item()),
    }


def load_heatmaps(routing: dict[RouterCall, RoutingReport]) -> dict[str, NDArray[np.uint8]]:
    """One grey picture per router name: a row per (layer, repeat), a column per expert.

    Black is an expert without tokens, middle grey an even load, white twice that or more: the
    scale is fixed, so that pictures of different steps compare.
    """
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    for call in sorted(routing):
        load = routing[call].load.flatten().double().numpy()
        relative = load / (load.mean() or 1.0)
        grey = (np.clip(relative / 2, 0, 1) * 255).astype(np.uint8)
        rows.setdefault(call.router, []).append(grey)
    height, width = _CELL
    return {
        router: np.stack(grey).repeat(height, axis=0).repeat(width, axis=1)
        for router, grey in rows.items()
    }
