"""Plans: one operation behind every routed projection, local or over ranks.

A routed projection reads input rows, multiplies each assignment (token, group, slot) by its
expert's matrices, and adds the results into output rows. What differs between its uses is
only at which *level* rows are read and written:

    sigma-MoE, softmax MoE   token -> token      up and down together, weighted
    MoA queries              token -> slot       not weighted
    MoA outputs              slot  -> token      weighted
    SwitchHead values        token -> head       weighted
    SwitchHead outputs       head  -> token      weighted

Shapes: T tokens, G router groups (heads in SwitchHead, else 1), K slots per token and router
group, A assignments. The levels token, head and slot have T, T * G and T * G * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.distributed.arriving import Arriving, here
from moa_dist.kernels.routed import routed_experts
from moa_dist.kernels.trip import Experts, Trip
from moa_dist.labels import is_part
from moa_dist.moe.router import Routing
from moa_dist.moe.statistics import occurrences

Level = Literal["token", "head", "slot"]


class DispatchPlan(Protocol):
    """How the rows of one routing travel to the experts of this rank and back.

    An immutable value: one plan serves several trips, as MoA's queries and outputs. Rows travel
    while other things are computed: between `send` and `apply` to the experts, between `apply` and
    the wait for its result back.
    """

    def send(self, x: Tensor, read: Level) -> Arriving:
        """Rows [rows of `read`, D] of this rank, on their way to their experts."""
        ...

    def apply(
        self, experts: Experts, sent: Arriving, read: Level, write: Level, *, weighted: bool
    ) -> Arriving:
        """Rows of level `read` that were sent -> [rows of `write`, O] of this rank.

        Every kept assignment sends its row through its expert, weighted by the router if asked;
        what arrives at one row is summed in fp32 or wider, sums that travel between ranks in the
        type of the rows. Dropped assignments and padding contribute zero. `experts` are those of
        this rank.
        """
        ...


class Dispatcher(Protocol):
    """Makes plans."""

    def plan(self, routing: Routing, num_experts: int) -> DispatchPlan:
        """Plan for `routing` over `num_experts` flat experts, all ranks together."""
        ...


@dataclass(frozen=True)
class Assignments:
    """Assignments as parallel vectors of length A."""

    expert: Tensor
    """int64 expert ids; those above the last expert belong to none."""
    weight: Tensor
    """Router weights in fp32 or wider."""
    rows: dict[Level, Tensor]
    """int64 row of each level."""
    num_rows: dict[Level, int]
    """Rows that each level has in all."""
    all_taken: bool
    """Whether all are known to belong to an expert."""


def assignments_of(routing: Routing, num_experts: int) -> Assignments:
    """All assignments of a routing, token-major; no expert has those that are not kept."""
    T, G, K = routing.expert_ids.shape
    expert = routing.expert_ids
    if routing.kept is not None:
        expert = expert.where(routing.kept, num_experts)
    slot = torch.arange(T * G * K, device=expert.device)
    return Assignments(
        expert=expert.flatten(),
        weight=routing.weights.flatten(),
        rows={"token": slot // (G * K), "head": slot // K, "slot": slot},
        num_rows={"token": T, "head": T * G, "slot": T * G * K},
        all_taken=routing.kept is None,
    )


@dataclass(frozen=True)
class LocalPlan:
    """Rows and experts are on this rank. The oracle of every other plan.

    Making and following it never looks at a value, so no accelerator is waited for.
    """

    counts: Tensor
    """[E] int64 rows per expert."""
    all_taken: bool
    """Whether they are known to be all."""
    weight: Tensor
    """[A], expert-major, those of no expert last."""
    rows: dict[Level, Tensor]
    """[A] row of each level, in the same order."""
    num_rows: dict[Level, int]
    """Rows that each level has in all."""

    @classmethod
    @is_part("dispatch")
    def of(cls, assignments: Assignments, num_experts: int) -> LocalPlan:
        """Sort by expert, keeping the order of tokens within one."""
        expert = assignments.expert
        order = expert.argsort(stable=True)
        return cls(
            counts=occurrences(expert, num_experts + 1)[:num_experts],
            all_taken=assignments.all_taken,
            weight=assignments.weight[order],
            rows={level: rows[order] for level, rows in assignments.rows.items()},
            num_rows=assignments.num_rows,
        )

    def send(self, x: Tensor, read: Level) -> Arriving:
        """See `DispatchPlan.send`."""
        return here(x)

    def apply(
        self, experts: Experts, sent: Arriving, read: Level, write: Level, *, weighted: bool
    ) -> Arriving:
        """See `DispatchPlan.apply`."""
        trip = self.trip(read, write, len(experts.down), weighted)
        return here(routed_experts(experts, sent.wait(), trip))

    def trip(self, read: Level, write: Level, num_experts: int, weighted: bool) -> Trip:
        """The rows' way from one level to another through `num_experts` matrices.

        A shard of experts may end in one that no token ever takes.
        """
        unused = num_experts - len(self.counts)
        return Trip(
            read=self.rows[read],
            write=self.rows[write],
            num_written=self.num_rows[write],
            counts=F.pad(self.counts, (0, unused)) if unused else self.counts,
            all_taken=self.all_taken,
            weight=self.weight if weighted else None,
        )


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, D] with `out[i]` the sum of `rows[a]` [A, D] over all a with index[a] = i."""
    return rows.new_zeros(num_rows, rows.shape[-1]).index_add(0, index, rows)


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are on this rank."""

    def plan(self, routing: Routing, num_experts: int) -> LocalPlan:
        """See `Dispatcher.plan`."""
        return LocalPlan.of(assignments_of(routing, num_experts), num_experts)
