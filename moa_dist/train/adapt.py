"""State of routers after an optimizer step: the only state that no gradient moves."""

from __future__ import annotations

from collections.abc import Mapping

from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.models.calls import RouterCall, RouterKey
from moa_dist.moe.adapt import StepLoad, adapt, adaptive
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingReport


def adapt_routers(
    routers: Mapping[RouterKey, Router],
    routing: Mapping[RouterCall, RoutingReport],
    comm_timer: CommTimer,
) -> None:
    """Adapt routers to the load of the whole step. Collective over all ranks.

    `routing` sums over this rank's micro-batches; a shared layer's repeats are added up here.
    """
    moving = adaptive(routers)
    if not moving:
        return
    own: dict[RouterKey, StepLoad] = {}
    for call, report in routing.items():
        if call.key in moving:
            step = StepLoad(report.load, report.entropy[1].long(), report.own)
            own[call.key] = own[call.key].plus(step) if call.key in own else step
    parts = [part for key in moving for part in own[key]]
    sums = iter(sum_over_ranks(parts, comm_timer, "loads that routers adapt to"))
    adapt(moving, {key: StepLoad(next(sums), next(sums), next(sums)) for key in moving})
