"""The auxiliary losses of all routers of a model.

Routers that differ in their layer only are stacked, as one loss over all of them costs little more
than one of a single router.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.config.routers import RouterConfig
from moa_dist.models.calls import RouterCall, RouterKey
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingStatistics, stacked

SumOverRanks = Callable[[list[RoutingStatistics]], list[RoutingStatistics]]
"""Sums statistics over all ranks; parallelism sets it on a model from outside."""


def on_one_process(statistics: list[RoutingStatistics]) -> list[RoutingStatistics]:
    """Return the statistics unchanged, as there are no other ranks."""
    return statistics


class _Alike(NamedTuple):
    """What the routers have in common whose losses are computed together."""

    part: str
    """The part of a layer that they belong to, `attention` or `ffn`; or `depth`."""
    config: RouterConfig
    """Their configuration, which says what their losses are."""
    num_repeats: int
    """Applications of each."""
    shape: torch.Size
    """[N, G, E] of their statistics."""
    weighed: bool
    """Whether these count tokens by weights."""


_Applications = dict[RouterKey, list[RoutingStatistics]]
"""Statistics of each application of some routers."""


def aux_losses(
    statistics: Mapping[RouterCall, RoutingStatistics],
    routers: Mapping[RouterKey, Router],
    sum_over_ranks: SumOverRanks = on_one_process,
) -> dict[str, Tensor]:
    """Sum losses over distinct layers, each over all of its repeats (MoEUT section 2.2).

    Returns scalars by part and loss, such as `ffn/entropy`, coefficients applied. `sum_over_ranks`
    serves the `BalanceConfig.scope` global_batch.
    """
    alike: dict[_Alike, _Applications] = {}
    repeats = Counter(call.key for call in statistics)
    for call, value in statistics.items():
        part = call.router.partition(".")[0]
        config, weighed = routers[call.key].config, value.weight is not None
        kind = _Alike(part, config, repeats[call.key], value.load.shape, weighed)
        of_losses = value._replace(reported=None)
        alike.setdefault(kind, {}).setdefault(call.key, []).append(of_losses)
    sums: dict[str, Tensor] = {}
    for kind, value in _in_scope(alike, sum_over_ranks).items():
        first = routers[next(iter(alike[kind]))]
        for name, loss in first.losses(value).items():
            key, of_all = f"{kind.part}/{name}", loss * len(value.load)
            sums[key] = sums[key] + of_all if key in sums else of_all
    return sums


def _in_scope(
    alike: dict[_Alike, _Applications], sum_over_ranks: SumOverRanks
) -> dict[_Alike, RoutingStatistics]:
    """Add up repeats, stack routers, and pool the groups that `BalanceConfig.scope` names."""
    result = {}
    for kind, applications in alike.items():
        every = stacked(value for values in applications.values() for value in values)
        of_routers = every.summed_repeats(len(applications))
        if kind.config.balance.pool_layers:
            of_routers = of_routers.summed_repeats(1)
        is_pooled = kind.config.balance.scope != "sequences"
        result[kind] = of_routers.as_one_group() if is_pooled else of_routers
    if pooled := [kind for kind in result if kind.config.balance.scope == "global_batch"]:
        of_all_ranks = sum_over_ranks([result[kind] for kind in pooled])
        result |= zip(pooled, of_all_ranks, strict=True)
    return result
