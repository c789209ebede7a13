"""Dispatch plans: the one operation behind every routed projection, local or across ranks.

A routed projection reads input rows, multiplies each assignment (token, group, slot) by its
expert's matrices, and adds the results into output rows. What differs between its uses is
only at which *level* rows are read and written:

    sigma-MoE, softmax MoE   token -> token      up and down together, weighted
    MoA queries              token -> slot       not weighted
    MoA outputs              slot  -> token      weighted
    SwitchHead values        token -> group      weighted
    SwitchHead outputs       group -> token      weighted

Shapes: T tokens, G router groups (heads in SwitchHead, else 1), K slots per token and router
group, A assignments. The levels token, group and slot have T, T * G and T * G * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.distributed.pending import Pending, ready
from moa_dist.kernels.routed_experts import RoutedExperts, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from moa_dist.kernels.segment_sum import permute
from moa_dist.moe.expert_sort import sort_by_expert
from moa_dist.moe.router import Routing
from moa_dist.profiling import annotated

Level = Literal["token", "group", "slot"]


class DispatchPlan(Protocol):
    """Sends the rows of one routing to their experts, and sums the results into output rows.

    An immutable value: one plan serves several round trips, such as MoA's queries and outputs. A
    layer may compute while rows are in flight: to their experts between `dispatch` and
    `run_and_combine`, and back until it waits for the result.
    """

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Send rows x [rows of `read`, D] of this rank to their experts."""
        ...

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Turn rows of level `read` that were sent into [rows of `write`, O] of this rank.

        Each assignment that is kept multiplies its row by its expert, and by the router's weight if
        `weighted`. Results of one output row are summed in fp32 or wider; sums are exchanged
        between ranks in the type of the rows. Dropped assignments and padding contribute zero.
        `experts` are those of this rank.
        """
        ...


class Dispatcher(Protocol):
    """Makes dispatch plans."""

    @property
    def kernel(self) -> RoutedExperts:
        """Runs the experts."""

    def plan(self, routing: Routing, num_experts: int) -> DispatchPlan:
        """Plan for `routing` over the `num_experts` flat experts of all ranks."""
        ...


@dataclass(frozen=True)
class Assignments:
    """Assignments of tokens to experts, as parallel vectors of length A in the order of their rows.

    No level's rows ever decrease along them.
    """

    expert: Tensor
    """int64 expert ids; an id past the last expert marks an assignment that was dropped."""
    weight: Tensor
    """Router weights in fp32 or wider."""
    rows: dict[Level, Tensor]
    """int64 row of each assignment, by level."""
    num_rows: dict[Level, int]
    """Number of rows of each level."""
    is_dropless: bool
    """Whether every assignment is known to belong to an expert."""
    starts: dict[Level, Tensor] = field(default_factory=dict)
    """[rows + 1] where the assignments of each row start, by level; a level that is missing has
    equally many for each row."""


def flat_experts(routing: Routing, num_experts: int) -> Tensor:
    """Return the expert of each assignment [A], token-major; `num_experts` for those not kept."""
    expert = routing.topk_ids
    if routing.keep_mask is not None:
        expert = expert.where(routing.keep_mask, num_experts)
    return expert.flatten()


def assignments_of(routing: Routing, num_experts: int) -> Assignments:
    """List all assignments of a routing, token-major; those not kept get no expert."""
    T, G, K = routing.topk_ids.shape
    slot = torch.arange(T * G * K, device=routing.topk_ids.device)
    return Assignments(
        expert=flat_experts(routing, num_experts),
        weight=routing.topk_weights.flatten(),
        rows={"token": slot // (G * K), "group": slot // K, "slot": slot},
        num_rows={"token": T, "group": T * G, "slot": T * G * K},
        is_dropless=routing.keep_mask is None,
    )


@dataclass(frozen=True)
class LocalPlan:
    """Plan for rows and experts that are on this rank; every other plan must equal it.

    It never reads a value on the host, so it never waits for an accelerator.
    """

    counts: Tensor
    """[E] int64 rows per expert."""
    is_dropless: bool
    """Whether `counts` is known to cover all assignments."""
    weight: Tensor
    """[A] router weights, expert-major; assignments without an expert come last."""
    rows: dict[Level, Rows]
    """Rows of the assignments in the same order, by level."""
    kernel: RoutedExperts = routed_experts
    """Runs the experts."""

    @classmethod
    @annotated("dispatch")
    def of(
        cls, assignments: Assignments, num_experts: int, kernel: RoutedExperts = routed_experts
    ) -> LocalPlan:
        """Sort assignments by expert, keeping the order of tokens within each."""
        by_expert = sort_by_expert(assignments.expert, num_experts, [])
        order = by_expert.order
        place = by_expert.place
        # Assignments come in the order of their rows, so their places are sorted by row.
        return cls(
            counts=by_expert.counts,
            is_dropless=assignments.is_dropless,
            weight=permute(assignments.weight, order, place),
            rows={
                level: Rows(
                    rows[order], place, assignments.starts.get(level), assignments.num_rows[level]
                )
                for level, rows in assignments.rows.items()
            },
            kernel=kernel,
        )

    @classmethod
    @annotated("dispatch")
    def of_routing(
        cls, routing: Routing, num_experts: int, kernel: RoutedExperts = routed_experts
    ) -> LocalPlan:
        """Sort all assignments of a routing, of which every row has equally many."""
        T, G, K = routing.topk_ids.shape
        expert = flat_experts(routing, num_experts)
        by_expert = sort_by_expert(expert, num_experts, [K] if G == 1 else [G * K, K])
        token, *group = by_expert.quotients
        return cls(
            counts=by_expert.counts,
            is_dropless=routing.keep_mask is None,
            weight=permute(routing.topk_weights.flatten(), by_expert.order, by_expert.place),
            # Every row has equally many assignments, which lie one after the other.
            rows={
                "token": Rows(token, by_expert.place, None, T),
                "group": Rows(group[0] if group else token, by_expert.place, None, T * G),
                "slot": Rows(by_expert.order, by_expert.place, None, T * G * K),
            },
            kernel=kernel,
        )

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Implement `DispatchPlan.dispatch`; nothing is sent."""
        return ready(x)

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Implement `DispatchPlan.run_and_combine`."""
        row_map = self.row_map(read, write, len(experts.down), weighted)
        return ready(self.kernel(experts, sent.wait(), row_map))

    def row_map(self, read: Level, write: Level, num_experts: int, weighted: bool) -> RowMap:
        """Map rows of one level to another through `num_experts` matrices.

        A shard may be padded by an expert that no token ever takes.
        """
        unused = num_experts - len(self.counts)
        return RowMap(
            read=self.rows[read],
            write=self.rows[write],
            counts=F.pad(self.counts, (0, unused)) if unused else self.counts,
            is_dropless=self.is_dropless,
            weight=self.weight if weighted else None,
        )


@dataclass(frozen=True)
class LocalTokenDispatcher:
    """Dispatcher for experts that are all on this rank."""

    kernel: RoutedExperts = routed_experts
    """Runs the experts."""

    def plan(self, routing: Routing, num_experts: int) -> LocalPlan:
        """Implement `Dispatcher.plan`."""
        return LocalPlan.of_routing(routing, num_experts, self.kernel)
