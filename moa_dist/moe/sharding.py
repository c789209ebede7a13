"""Applies expert parallelism to a model that was written for one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.collectives import all_gather_shards, sum_over_ranks
from moa_dist.distributed.comm_group import CommGroup
from moa_dist.distributed.mesh import Mesh
from moa_dist.moe.all_to_all import AllToAllTokenDispatcher
from moa_dist.moe.experts import expert_layers, shard_starts
from moa_dist.moe.routed_module import RoutedModule, routed_modules
from moa_dist.moe.statistics import RoutingStatistics


def exchange_tokens(module: RoutedModule, comm_group: CommGroup) -> None:
    """Send rows to the ranks of their experts, in every application of `module`."""
    module.dispatcher = AllToAllTokenDispatcher(comm_group, module.dispatcher.kernel)


def exchange_weights(module: RoutedModule, comm_group: CommGroup) -> None:
    """Gather the weights of all experts of `module` on every rank, once per forward."""
    for layer in module.held_expert_layers().values():
        starts = shard_starts(layer.num_experts, comm_group.group.size())
        sizes = [stop - first for first, stop in pairwise(starts)]
        layer.gather = partial(all_gather_shards, sizes=sizes, comm_group=comm_group)


EXCHANGES: dict[str, Callable[[RoutedModule, CommGroup], None]] = {
    "tokens": exchange_tokens,
    "weights": exchange_weights,
}
"""What ranks may exchange for a sharded module, by the name in `parallel.expert_exchange`.

A new one is a value there, a function here, and its traffic in `plan/predicted_traffic.py`."""


def shard_experts(
    model: nn.Module,
    mesh: Mesh,
    exchange: ExpertExchangeConfig | None = None,
    *,
    overlap: bool = False,
) -> None:
    """Keep this rank's experts of every `RoutedModule`, attention and FFN alike.

    `exchange` says for each part of a layer what ranks exchange: tokens by default; `auto` must
    have been decided. With `overlap` they exchange it while they compute. Best called while
    parameters are on the meta device, so that no rank ever holds all experts.
    """
    if mesh.expert_parallel == 1:
        return
    exchange = exchange or ExpertExchangeConfig()
    unseen = dict(expert_layers(model))
    for name, module in routed_modules(model):
        exchanged = getattr(exchange, module.part)
        assert exchanged != "auto", "see moa_dist.plan.exchange_choice"
        comm_group = mesh.ep_comm_group(name, overlap=overlap)
        for layer_name, layer in module.held_expert_layers().items():
            del unseen[f"{name}.{layer_name}"]
            layer.shard(mesh.ep_group.rank(), mesh.expert_parallel)
        EXCHANGES[exchanged](module, comm_group)
    # Whole on every rank, such a layer would still be reduced as if it were a shard.
    assert not unseen, f"experts outside of a RoutedModule: {', '.join(unseen)}"


def pool_statistics(statistics: list[RoutingStatistics], *, mesh: Mesh) -> list[RoutingStatistics]:
    """Sum statistics over all ranks, for losses on all tokens of a step.

    This takes one collective in the forward pass and none in the backward pass.

    Every rank then has the same loss L(s_1 + ... + s_W), whose gradient is the sum over ranks of
    L' ds_r. Training averages gradients over ranks, so each rank's own share counts W times.
    """

    def pooled(total: Tensor, own: Tensor) -> Tensor:
        if not own.requires_grad:
            return total
        return total + mesh.world_size * (own - own.detach())

    parts = [part for value in statistics for part in value.present()]
    totals = sum_over_ranks(parts, mesh.comm_timer, "statistics of the global batch")
    sums = map(pooled, totals, parts)
    return [value.each(lambda _: next(sums)) for value in statistics]
