"""Expert parallelism, applied to a model that was written for one process."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moa_dist.distributed.mesh import Mesh
from moa_dist.moe.dispatch import RoutedModule
from moa_dist.moe.exchange import ExchangeDispatcher, first_expert
from moa_dist.moe.experts import GroupedLinear


def shard_experts(model: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's experts of every layer, and dispatch over the ep group.

    Attention and FFN experts alike: whatever is a `GroupedLinear` or a `RoutedModule`.
    Best called while parameters are on the meta device, so that no rank ever holds all.
    """
    if mesh.expert_parallel == 1:
        return
    rank = mesh.ep_group.rank()
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            first, stop = (
                first_expert(module.num_experts, r, mesh.expert_parallel) for r in (rank, rank + 1)
            )
            module.shard(first, stop)
        if isinstance(module, RoutedModule):
            module.dispatcher = ExchangeDispatcher(mesh.ep_group)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, GroupedLinear]]:
    """Name and module of every expert tensor."""
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            yield name, module
