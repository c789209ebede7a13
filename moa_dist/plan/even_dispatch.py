"""A dispatcher with the shapes of an exchange in which routers choose evenly.

It serves measurements without other ranks, on tensors without data (`moa_dist.plan.activations`).
Nothing is sent: the rows that a rank would send stand in for those that it would receive, of which
there are equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_dist.distributed.pending import Pending, ready
from moa_dist.kernels.routed_experts import RoutedExperts
from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.moe.dispatch import Assignments, Level, LocalPlan, assignments_of, sum_rows
from moa_dist.moe.router import Routing
from moa_dist.plan.predicted_traffic import expected_rows


@dataclass(frozen=True)
class EvenPlan:
    """Computes what `moa_dist.moe.all_to_all.AllToAllPlan` computes between its collectives."""

    routes: dict[Level, Tensor]
    """int64 rows to send, by level; a row occurs once per destination rank."""
    num_rows: dict[Level, int]
    """Number of rows of each level on this rank."""
    local: LocalPlan
    """Plan over the received rows."""

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Implement `DispatchPlan.dispatch`."""
        return ready(x.index_select(0, self.routes[read]))

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Implement `DispatchPlan.run_and_combine`."""
        sums = self.local.run_and_combine(experts, sent, read, write, weighted=weighted).wait()
        wide = sums.to(self.local.weight.dtype)
        return ready(sum_rows(wide, self.routes[write], self.num_rows[write]).to(sums.dtype))


@dataclass(frozen=True)
class EvenDispatcher:
    """Dispatcher over `num_ranks` ranks, each of which receives as much as it sends."""

    num_ranks: int
    kernel: RoutedExperts
    """Kernel that runs the experts."""

    def plan(self, routing: Routing, num_experts: int) -> EvenPlan:
        """Implement `Dispatcher.plan`; assumes that nothing is dropped."""
        T, G, K = routing.topk_ids.shape
        home = assignments_of(routing, num_experts)
        order = home.expert.argsort(stable=True)
        rows = expected_rows(
            T,
            num_groups=G,
            num_experts=num_experts // G,
            top_k=K,
            num_ranks=self.num_ranks,
        )
        with_own = self.num_ranks / (self.num_ranks - 1)
        num_sent = {level: round(rows.of(level) * with_own) for level in home.rows}
        received = Assignments(
            home.expert[order],
            home.weight[order],
            {level: index[order] for level, index in home.rows.items()},
            num_sent,
            is_dropless=True,
        )
        device = order.device
        return EvenPlan(
            routes={level: torch.arange(n, device=device) for level, n in num_sent.items()},
            num_rows=home.num_rows,
            local=LocalPlan.of(received, num_experts // self.num_ranks, self.kernel),
        )
