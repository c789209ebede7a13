"""A dispatcher with the shapes of an exchange in which routers choose evenly.

It serves measurements without other ranks, on tensors without data (`moa_dist.plan.activations`).
Nothing is sent: the rows that a rank would send stand in for those that it would receive, of which
there are equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moa_dist.distributed.pending import Pending, ready
from moa_dist.kernels.routed_experts import RoutedExperts
from moa_dist.kernels.row_map import ExpertWeights, Rows
from moa_dist.kernels.segment_sum import gather_rows, sum_rows
from moa_dist.moe.dispatch import Assignments, Level, LocalPlan, assignments_of
from moa_dist.moe.router import Routing
from moa_dist.plan.predicted_traffic import expected_rows


@dataclass(frozen=True)
class EvenPlan:
    """Computes what `moa_dist.moe.all_to_all.AllToAllPlan` computes between its collectives."""

    routes: dict[Level, Rows]
    """Rows to send, by level; a row occurs once per destination rank."""
    local: LocalPlan
    """Plan over the received rows."""

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Implement `DispatchPlan.dispatch`."""
        return ready(gather_rows(x, self.routes[read]))

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Implement `DispatchPlan.run_and_combine`."""
        sums = self.local.run_and_combine(experts, sent, read, write, weighted=weighted).wait()
        return ready(sum_rows(sums, self.routes[write]))


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
            starts={level: order.new_empty(n + 1) for level, n in num_sent.items()},
        )
        return EvenPlan(
            routes={  # each is the beginning of a tensor of all assignments
                level: Rows.of(order.new_empty(max(n, len(order)))[:n], home.num_rows[level])
                for level, n in num_sent.items()
            },
            local=LocalPlan.of(received, num_experts // self.num_ranks, self.kernel),
        )
