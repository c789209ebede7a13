"""Dispatch over an expert-parallel group by all-to-all.

A row travels **once per destination rank**, however many of that rank's experts it goes to:
it is expanded there, and the rank returns the weighted sum of its experts' outputs, one row
per output row. Per plan there is one exchange of counts and one of indices and weights; all
trips of the plan then exchange rows alone.

Shapes: P ranks in the group, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.distributed.collectives import all_to_all_counts, all_to_all_rows
from moa_dist.kernels.routed import Experts
from moa_dist.moe.dispatch import Assignments, Level, LocalPlan, assignments_of, sum_rows
from moa_dist.moe.experts import shard_starts
from moa_dist.moe.router import Routing

_TRAVELLING: tuple[Level, ...] = ("token", "head")
"""Levels in which one row may serve several assignments; a slot is an assignment itself."""


@dataclass(frozen=True)
class _Route:
    """Which rows of one level go to each rank, and how many come back."""

    rows: Tensor
    """int64 local rows to send, in the order of destination ranks."""
    sent: list[int]
    """[P] rows to each rank."""
    received: list[int]
    """[P] rows from each rank."""


@dataclass(frozen=True)
class ExchangePlan:
    """Send rows to the ranks of their experts, run a local plan there, send sums back."""

    group: dist.ProcessGroup
    """The expert-parallel group."""
    routes: dict[Level, _Route]
    """What travels, by level."""
    num_rows: dict[Level, int]
    """Rows that each level has on this rank."""
    local: LocalPlan
    """Plan over the received rows and the experts of this rank."""

    def apply(
        self, experts: Experts, x: Tensor, read: Level, write: Level, *, weighted: bool
    ) -> Tensor:
        """See `DispatchPlan.apply`."""
        received = self._send(x, self.routes[read])
        sums = self.local.apply(experts, received, read, write, weighted=weighted)
        return self._return(sums, self.routes[write], self.num_rows[write])

    def _send(self, x: Tensor, route: _Route) -> Tensor:
        sent = x.index_select(0, route.rows)
        return all_to_all_rows(sent, route.sent, route.received, self.group)

    def _return(self, sums: Tensor, route: _Route, num_rows: int) -> Tensor:
        returned = all_to_all_rows(sums, route.received, route.sent, self.group)
        wide = returned.to(self.local.weight.dtype)
        return sum_rows(wide, route.rows, num_rows).to(sums.dtype)


@dataclass(frozen=True)
class ExchangeDispatcher:
    """Experts are spread over the ranks of `group` in contiguous shards."""

    group: dist.ProcessGroup

    def plan(self, routing: Routing, num_experts: int) -> ExchangePlan:
        """See `Dispatcher.plan`. Collective: every rank of the group must enter it."""
        num_ranks, rank = self.group.size(), self.group.rank()
        home = assignments_of(routing)
        bounds = shard_starts(num_experts, num_ranks)
        starts = torch.tensor(bounds, device=home.expert.device)
        home, owner = _sort_by_owner(home, starts)

        # Indices are relative to the block of rows that goes to one rank, so that the
        # receiver only adds where the block starts.
        unique = {level: _unique_rows(home, owner, level, num_ranks) for level in _TRAVELLING}
        sent_counts = torch.stack(
            [owner.bincount(minlength=num_ranks), *(unique[lv].counts for lv in _TRAVELLING)], 1
        )
        received_counts = all_to_all_counts(sent_counts, self.group)
        (sent, *sent_rows), (received, *received_rows) = (
            counts.T.tolist() for counts in (sent_counts, received_counts)
        )
        indices = torch.stack(
            [home.expert - starts[owner], *(unique[lv].place for lv in _TRAVELLING)], 1
        )
        indices = all_to_all_rows(indices, sent, received, self.group)
        weight = all_to_all_rows(home.weight, sent, received, self.group)

        routes = {
            level: _Route(unique[level].rows, sent_rows[i], received_rows[i])
            for i, level in enumerate(_TRAVELLING)
        }
        routes["slot"] = _Route(home.rows["slot"], sent, received)
        source = torch.arange(num_ranks, device=weight.device).repeat_interleave(
            torch.tensor(received, device=weight.device)
        )
        block_starts = received_counts.cumsum(0) - received_counts
        arrived = Assignments(
            expert=indices[:, 0],
            weight=weight,
            rows={
                "token": indices[:, 1] + block_starts[source, 1],
                "head": indices[:, 2] + block_starts[source, 2],
                "slot": torch.arange(len(indices), device=weight.device),
            },
            num_rows={level: sum(route.received) for level, route in routes.items()},
        )
        num_local = bounds[rank + 1] - bounds[rank]
        return ExchangePlan(
            group=self.group,
            routes=routes,
            num_rows=home.num_rows,
            local=LocalPlan.of(arrived, num_local),
        )


def _sort_by_owner(home: Assignments, starts: Tensor) -> tuple[Assignments, Tensor]:
    """Assignments in the order of the ranks that own their experts, and those ranks [A]."""
    owner = torch.searchsorted(starts, home.expert, right=True) - 1
    order = owner.argsort(stable=True)
    sorted_home = replace(
        home,
        expert=home.expert[order],
        weight=home.weight[order],
        rows={level: rows[order] for level, rows in home.rows.items()},
    )
    return sorted_home, owner[order]


@dataclass(frozen=True)
class _UniqueRows:
    """Distinct (rank, row) pairs of one level."""

    rows: Tensor
    """Rows to send, rank by rank."""
    counts: Tensor
    """[P] rows per rank."""
    place: Tensor
    """[A] place of each assignment's row within its rank's block."""


def _unique_rows(home: Assignments, owner: Tensor, level: Level, num_ranks: int) -> _UniqueRows:
    """Assignments must be sorted by owner, and by row within one."""
    num_rows = max(home.num_rows[level], 1)
    pairs, inverse = torch.unique_consecutive(
        owner * num_rows + home.rows[level], return_inverse=True
    )
    counts = (pairs // num_rows).bincount(minlength=num_ranks)
    starts = counts.cumsum(0) - counts
    return _UniqueRows(rows=pairs % num_rows, counts=counts, place=inverse - starts[owner])
