"""Selection biases after an optimizer step: the only state that no gradient moves."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.models.stack import RouterCall, RouterKey
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingReport


def update_biases(
    routers: Mapping[RouterKey, Router],
    routing: Mapping[RouterCall, RoutingReport],
    comm_timer: CommTimer,
) -> None:
    """Move every bias by the load of the whole step. Collective over all ranks.

    `routing` sums over this rank's micro-batches; a shared layer's repeats are added up here.
    """
    biases = {key: router.bias for key, router in routers.items() if router.bias is not None}
    if not biases:
        return
    own: dict[RouterKey, Tensor] = {}
    for call, report in routing.items():
        if call.key in biases:
            own[call.key] = own[call.key] + report.load if call.key in own else report.load
    loads = sum_over_ranks([own[key] for key in biases], comm_timer, "loads that move biases")
    for bias, load in zip(biases.values(), loads, strict=True):
        bias.update(load)
