"""Summarizes routing statistics as numbers and as heatmaps.

Shapes: G router groups (heads in SwitchHead, else 1), E experts per router group.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from moa_dist.models.stack import RouterCall
from moa_dist.moe.statistics import RoutingReport

_CELL = (8, 4)
"""Height and width of one expert in a heatmap, in pixels."""


def router_call_name(call: RouterCall) -> str:
    """Name a router call, such as `layer0.repeat1.ffn`; repeat 0 if the layer is not repeated."""
    return f"layer{call.layer}.repeat{call.repeat}.{call.router}"


def router_call_of(name: str) -> RouterCall | None:
    """Parse a name made by `router_call_name`; None if it is not one."""
    found = re.fullmatch(r"layer(\d{1,9})\.repeat(\d{1,9})\.(.+)", name)
    return RouterCall(int(found[1]), int(found[2]), found[3]) if found else None


def drop_share(report: RoutingReport) -> float:
    """Return the share of assignments that were dropped because capacity was exceeded."""
    return report.dropped.sum().item() / max(report.load.sum().item(), 1)


def overall_drop_share(routing: dict[RouterCall, RoutingReport]) -> float:
    """Return the share of dropped assignments over all routers together."""
    dropped = sum(report.dropped.sum().item() for report in routing.values())
    return dropped / max(sum(report.load.sum().item() for report in routing.values()), 1)


def routing_summary(report: RoutingReport) -> dict[str, float]:
    """Summarize one router call in four numbers."""
    load = report.load.double()
    entropy, pairs = report.entropy.tolist()
    return {
        "drop_share": drop_share(report),
        # nats per token, mean over router groups
        "entropy": entropy / max(pairs, 1),
        # Every router group makes the same number of choices, so one mean serves all of them.
        "load_imbalance": load.max().item() / (load.mean().item() or 1.0),
        "dead_experts": float((load == 0).sum().item()),
    }


def load_heatmaps(routing: dict[RouterCall, RoutingReport]) -> dict[str, NDArray[np.uint8]]:
    """Draw one gray picture per router name, with a row per (layer, repeat), a column per expert.

    Black is an expert without tokens, middle gray an even load, white twice that or more. The
    scale is fixed, so that pictures of different steps can be compared.
    """
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    for call in sorted(routing):
        load = routing[call].load.flatten().double().numpy()
        relative = load / (load.mean() or 1.0)
        gray = (np.clip(relative / 2, 0, 1) * 255).astype(np.uint8)
        rows.setdefault(call.router, []).append(gray)
    height, width = _CELL
    return {
        router: np.stack(gray).repeat(height, axis=0).repeat(width, axis=1)
        for router, gray in rows.items()
    }
