"""Dispatch over an expert-parallel group by all-to-all.

A row is sent **once per destination rank**, to however many of that rank's experts it goes: it is
expanded there, and the rank returns the weighted sum of its experts' outputs, one row per output
row. A plan costs three exchanges, of counts, indices and weights; all its round trips then
exchange rows alone.

Shapes: P ranks in the group, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moa_dist.distributed.collectives import all_to_all_counts, all_to_all_rows
from moa_dist.distributed.comm_group import CommGroup
from moa_dist.distributed.pending import Pending
from moa_dist.kernels.routed_experts import RoutedExperts, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, Rows, starts_of
from moa_dist.kernels.segment_sum import gather_rows, permute, sum_rows
from moa_dist.moe.dispatch import Assignments, Level, LocalPlan, assignments_of
from moa_dist.moe.expert_sort import sort_by_expert
from moa_dist.moe.experts import shard_starts
from moa_dist.moe.router import Routing
from moa_dist.profiling import annotate, annotated

_SHARED_LEVELS: tuple[Level, ...] = ("token", "group")
"""Levels of which one row may serve several assignments; a slot is an assignment itself."""


@dataclass(frozen=True)
class _Route:
    """Rows of one level to send to each rank, and how many come back."""

    rows: Rows
    """Local rows to send, in the order of destination ranks."""
    sent: list[int]
    """[P] number of rows sent to each rank."""
    received: list[int]
    """[P] number of rows received from each rank."""


@dataclass(frozen=True)
class AllToAllPlan:
    """Sends rows to the ranks of their experts, runs a local plan there, and returns the sums."""

    comm_group: CommGroup
    """The expert-parallel group."""
    routes: dict[Level, _Route]
    """Rows to exchange, by level."""
    local: LocalPlan
    """Plan over the received rows and the experts of this rank."""

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Implement `DispatchPlan.dispatch` by one all-to-all."""
        route = self.routes[read]
        with annotate("dispatch"):
            rows = gather_rows(x, route.rows)
        return all_to_all_rows(rows, route.sent, route.received, self.comm_group, "dispatch")

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Implement `DispatchPlan.run_and_combine`; sums return by one all-to-all."""
        route = self.routes[write]

        @annotated("dispatch")
        def add_up(returned: Tensor) -> Tensor:
            return sum_rows(returned, route.rows)

        sums = self.local.run_and_combine(experts, sent, read, write, weighted=weighted).wait()
        return all_to_all_rows(sums, route.received, route.sent, self.comm_group, "combine").then(
            add_up
        )


@dataclass(frozen=True)
class AllToAllTokenDispatcher:
    """Dispatcher for experts that are sharded contiguously over the ranks of a group."""

    comm_group: CommGroup
    kernel: RoutedExperts = routed_experts
    """Runs the experts."""

    @annotated("dispatch")
    def plan(self, routing: Routing, num_experts: int) -> AllToAllPlan:
        """Implement `Dispatcher.plan`. Collective: every rank of the group must call it.

        Waits for an accelerator once, for the counts that say how much to send and to receive.
        """
        group = self.comm_group.group
        num_ranks, rank = group.size(), group.rank()
        bounds = shard_starts(num_experts, num_ranks)
        home, owner, num_sent = _sorted_by_owner(routing, num_experts, num_ranks)

        # Indices are relative to the block of rows that goes to one rank, so that the
        # receiver only adds where the block starts.
        levels = _SHARED_LEVELS if routing.topk_ids.shape[1] > 1 else _SHARED_LEVELS[:1]
        unique = {level: _unique_rows(home, owner, level, num_ranks) for level in levels}
        sent_counts = torch.stack([num_sent, *(unique[level].counts for level in levels)], 1)
        received_counts = all_to_all_counts(sent_counts, self.comm_group)
        (sent, *sent_rows), (received, *received_rows) = torch.stack(
            [sent_counts, received_counts]
        ).mT.tolist()
        # What follows the rows that are sent was dropped, or is padding.
        home = _first(home, sum(sent))
        first_expert = owner * num_experts // num_ranks
        indices = torch.stack(
            [
                home.expert - first_expert[: sum(sent)],
                *(unique[level].place[: sum(sent)] for level in levels),
            ],
            1,
        )
        arriving = [
            all_to_all_rows(x, sent, received, self.comm_group, "plan")
            for x in (indices.int(), home.weight)
        ]
        routes = {
            level: _Route(
                Rows.of(unique[level].rows[: sum(sent_rows[i])], home.num_rows[level]),
                sent_rows[i],
                received_rows[i],
            )
            for i, level in enumerate(levels)
        }
        routes.setdefault("group", routes["token"])  # one router group: the same rows
        slots = Rows.of(home.rows["slot"], home.num_rows["slot"])
        routes["slot"] = _Route(slots, sent, received)
        indices, weight = (x.wait() for x in arriving)
        arrived = _arrived(indices, weight, received_counts, routes, levels)
        return AllToAllPlan(
            comm_group=self.comm_group,
            routes=routes,
            local=LocalPlan.of(arrived, bounds[rank + 1] - bounds[rank], self.kernel),
        )


def _sorted_by_owner(
    routing: Routing, num_experts: int, num_ranks: int
) -> tuple[Assignments, Tensor, Tensor]:
    """Sort all assignments by the rank that owns their expert; those without an expert come last.

    Returns them, those ranks [A], P for no rank, and the number of assignments of each rank [P].
    """
    home = assignments_of(routing, num_experts)
    # The inverse of `shard_starts`, on the device.
    owner = (((home.expert + 1) * num_ranks - 1) // num_experts).clamp(max=num_ranks)
    counts, order, place, _ = sort_by_expert(owner, num_ranks, [])
    sorted_home = replace(
        home,
        expert=home.expert[order],
        weight=permute(home.weight, order, place),
        rows={level: rows[order] for level, rows in home.rows.items()},
    )
    return sorted_home, owner[order], counts


def _first(home: Assignments, num: int) -> Assignments:
    """Select the first `num` assignments."""
    rows = {level: rows[:num] for level, rows in home.rows.items()}
    return replace(home, expert=home.expert[:num], weight=home.weight[:num], rows=rows)


def _arrived(
    indices: Tensor,
    weight: Tensor,
    received_counts: Tensor,
    routes: dict[Level, _Route],
    levels: tuple[Level, ...],
) -> Assignments:
    """Describe received assignments in terms of the rows that this rank receives.

    `indices` [A, 1 + levels]: local expert, and place within the rows that one rank sends.
    """
    num_rows = {level: sum(route.received) for level, route in routes.items()}
    num_assignments, device = num_rows["slot"], weight.device
    source = torch.arange(len(received_counts), device=device).repeat_interleave(
        received_counts[:, 0], output_size=num_assignments
    )
    block_starts = (received_counts.cumsum(0) - received_counts)[source]
    expert, *places = indices.long().unbind(1)
    rows = {level: places[i] + block_starts[:, 1 + i] for i, level in enumerate(levels)}
    # Each rank sends its assignments by row, so they are sorted by row here as well.
    starts = {level: starts_of(rows[level], num_rows[level]) for level in levels}
    for by_level in (rows, starts):
        by_level.setdefault("group", by_level["token"])
    rows["slot"] = torch.arange(num_assignments, device=device)
    return Assignments(expert, weight, rows, num_rows, is_dropless=True, starts=starts)


@dataclass(frozen=True)
class _UniqueRows:
    """Distinct (rank, row) pairs of one level."""

    rows: Tensor
    """[A] rows to send, rank by rank; undefined beyond them."""
    counts: Tensor
    """[P] rows per rank."""
    place: Tensor
    """[A] place of each assignment's row within its rank's block."""


def _unique_rows(home: Assignments, owner: Tensor, level: Level, num_ranks: int) -> _UniqueRows:
    """Find the distinct rows of each rank in assignments sorted by owner, then by row."""
    row = home.rows[level]
    # Changes of owner count too: the same row may go to two ranks, one after the other.
    is_new = torch.ones_like(row)
    is_new[1:] = (row.diff() != 0) | (owner.diff() != 0)
    number = is_new.cumsum(0) - 1
    counts = row.new_zeros(num_ranks + 1).scatter_add_(0, owner, is_new)
    starts = counts.cumsum(0) - counts
    return _UniqueRows(
        rows=torch.empty_like(row).scatter_(0, number, row),
        counts=counts[:num_ranks],
        place=number - starts[owner],
    )
