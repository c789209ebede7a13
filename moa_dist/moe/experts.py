"""Grouped experts: one weight matrix per expert, perhaps sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moa_dist.distributed.pending import Pending
from moa_dist.moe.initialize import Initializer


def shard_starts(num_experts: int, num_ranks: int) -> list[int]:
    """Return bounds of all shards: rank r holds experts [starts[r], starts[r + 1]).

    Shards differ by one expert at most.
    """
    return [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]


class GroupedLinear(nn.Module):
    """Holds the matrices of a layer's experts: expert e multiplies by `weight[e - first_expert]`.

    `num_experts` counts all experts. This rank holds `num_local` of them from `first_expert` on:
    all until `shard` is called. `gather`, if set, starts to gather the weights of all experts
    [E, d_in, d_out] from the shards of all ranks.
    """

    def __init__(self, num_experts: int, d_in: int, d_out: int, init: Initializer) -> None:
        super().__init__()
        self.num_experts = self.num_local = num_experts
        self.first_expert = 0
        self.gather: Callable[[Tensor], Pending] | None = None
        self.d_in, self.d_out = d_in, d_out  # kept: a sharded `weight` may be empty between calls
        self.init = init
        self.weight = nn.Parameter(torch.empty(num_experts, d_in, d_out))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter, drawn per expert."""
        return {"weight": self.init}

    def shard(self, rank: int, num_ranks: int) -> None:
        """Keep the experts of `rank` only.

        `weight` has the same number of rows on every rank; the last may be padding that no token
        ever takes. DeepSpeed cuts gradients into buckets by local sizes, so ranks of different
        sizes would reduce mismatched buckets.
        """
        starts = shard_starts(self.num_experts, num_ranks)
        mine = self.weight.detach()[starts[rank] : starts[rank + 1]]
        self.first_expert, self.num_local = starts[rank], len(mine)
        weight = mine.new_zeros(-(-self.num_experts // num_ranks), self.d_in, self.d_out)
        weight[: len(mine)] = mine
        self.weight = nn.Parameter(weight)

    def macs_per_row(self) -> int:
        """Count multiply-accumulates for one row."""
        return self.d_in * self.d_out

    def forward(self) -> Pending:
        """Start to gather the weights [E, d_in, d_out] of all experts.

        This is a call of the module: what shards parameters gathers them per call.
        """
        assert self.gather is not None
        return self.gather(self.weight)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, GroupedLinear]]:
    """Yield name and module of every expert tensor."""
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            yield name, module
