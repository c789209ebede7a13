"""Summarizes routing statistics as numbers.

Shapes: G router groups (heads in SwitchHead, else 1), E experts per router group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport

ENOUGH_LOAD = 64
"""Mean number of tokens per expert from which one step tells how a router uses its experts. With
fewer, chance decides: an expert that gets a tenth of the mean gets no token in 0.2 % of all steps
at 64 (e^-6.4), but in 20 % at 16."""


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


def routing_summary(report: RoutingReport, mean_names: Sequence[str] = ()) -> dict[str, float]:
    """Summarize one router call in numbers; `mean_names` are those of the router."""
    load = report.load.double()
    entropy, pairs = report.entropy.tolist()
    num_tokens = max(pairs, 1) / len(load)
    means = (report.reported / num_tokens).tolist() if mean_names else ()
    return {
        "drop_share": drop_share(report),
        "experts_per_token": report.load.sum().item() / max(pairs, 1),
        # nats per token, mean over router groups
        "entropy": entropy / max(pairs, 1),
        # Every router group makes the same number of choices, so one mean serves all of them.
        "load_imbalance": load.max().item() / (load.mean().item() or 1.0),
        "dead_experts": float((load == 0).sum().item()),
        **dict(zip(mean_names, means, strict=True)),
    }


def dead_experts(routing: dict[RouterCall, RoutingReport]) -> tuple[int, int]:
    """Count the experts that no token chose in any repeat of their layer, and all experts.

    Routers with less than `ENOUGH_LOAD` are left out of both.
    """
    loads: dict[tuple[int, str], Tensor] = {}
    for call, report in routing.items():
        key = call.layer, call.router
        loads[key] = loads[key] + report.load if key in loads else report.load
    counted = [load for load in loads.values() if load.double().mean().item() >= ENOUGH_LOAD]
    dead = sum(int((load == 0).sum()) for load in counted)
    return dead, sum(load.numel() for load in counted)


def worst_imbalance(routing: dict[RouterCall, RoutingReport]) -> tuple[float, str]:
    """Return the largest ratio of an expert's load to the mean, and the name of the router call.

    Router calls with less than `ENOUGH_LOAD` are left out; (0, "") if none is left.
    """
    return max(
        (
            (routing_summary(report)["load_imbalance"], router_call_name(call))
            for call, report in routing.items()
            if report.load.double().mean().item() >= ENOUGH_LOAD
        ),
        default=(0.0, ""),
    )
