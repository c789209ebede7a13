"""Parallelism, applied to a model that was written for one process."""

from __future__ import annotations

from functools import partial
from itertools import islice, pairwise

from torch import Tensor, nn

from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.collectives import all_gather_shards, sum_over_ranks
from moa_dist.distributed.mesh import Mesh
from moa_dist.moe.all_to_all import AllToAllTokenDispatcher
from moa_dist.moe.experts import GroupedLinear, expert_layers, shard_starts
from moa_dist.moe.routed_module import RoutedModule
from moa_dist.moe.statistics import RoutingStatistics


def shard_experts(
    model: nn.Module,
    mesh: Mesh,
    exchange: ExpertExchangeConfig | None = None,
    *,
    overlap: bool = False,
) -> None:
    """Keep this rank's experts of every `RoutedModule`, attention and FFN alike.

    `exchange` says by the module's name, `attention` or `ffn`, what travels: tokens if absent;
    `auto` has been decided. With `overlap` it travels while other things are computed.
    Best called while parameters are on the meta device, so that no rank ever holds all.
    """
    if mesh.expert_parallel == 1:
        return
    exchange = exchange or ExpertExchangeConfig()
    unseen = dict(expert_layers(model))
    for name, module in model.named_modules():
        if not isinstance(module, RoutedModule):
            continue
        travels = getattr(exchange, name.rpartition(".")[2])
        assert travels != "auto", "see moa_dist.plan.exchange_choice"
        comm_group = mesh.ep_comm_group(name, overlap=overlap)
        if travels == "tokens":
            module.dispatcher = AllToAllTokenDispatcher(comm_group)
        for child_name, child in module.named_children():
            if isinstance(child, GroupedLinear):
                del unseen[f"{name}.{child_name}"]
                child.shard(mesh.ep_group.rank(), mesh.expert_parallel)
                if travels == "weights":
                    starts = shard_starts(child.num_experts, mesh.expert_parallel)
                    sizes = [stop - first for first, stop in pairwise(starts)]
                    child.gather = partial(all_gather_shards, sizes=sizes, comm_group=comm_group)
    # Whole on every rank, such a layer would still be reduced as if it were a shard.
    assert not unseen, f"experts outside of a RoutedModule: {', '.join(unseen)}"


def pool_statistics(statistics: list[RoutingStatistics], *, mesh: Mesh) -> list[RoutingStatistics]:
    """Sums over all ranks, for losses on all tokens of a step. One collective, none backward.

    Every rank then has the same loss L(s_1 + ... + s_W), whose gradient is the sum over ranks of
    L' ds_r. Training averages gradients over ranks, so each rank's own share counts W times.
    """

    def pooled(total: Tensor, own: Tensor) -> Tensor:
        if not own.requires_grad:
            return total
        return total + mesh.world_size * (own - own.detach())

    parts = [part for value in statistics for part in value]
    totals = sum_over_ranks(parts, mesh.comm_timer, "statistics of the global batch")
    sums = map(pooled, totals, parts)
    return [RoutingStatistics(*islice(sums, len(value))) for value in statistics]
