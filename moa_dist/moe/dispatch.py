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
group, A assignments that experts on this rank take. The levels token, head and slot have T, T * G
and T * G * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moa_dist.distributed.arriving import Arriving, here
from moa_dist.kernels.routed import Experts, Trip, routed_experts
from moa_dist.labels import is_part
from moa_dist.moe.router import Routing

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
    """Kept assignments, as parallel vectors of length A."""

    expert: Tensor
    """int64 expert ids."""
    weight: Tensor
    """Router weights in fp32 or wider."""
    rows: dict[Level, Tensor]
    """int64 row of each level."""
    num_rows: dict[Level, int]
    """Rows that each level has in all."""


def assignments_of(routing: Routing) -> Assignments:
    """All kept assignments of a routing, token-major."""
    T, G, K = routing.expert_ids.shape
    device = routing.expert_ids.device
    expert, weight = routing.expert_ids.flatten(), routing.weights.flatten()
    if routing.kept is None:
        slot = torch.arange(T * G * K, device=device)
    else:
        slot = routing.kept.flatten().nonzero().squeeze(-1)
        expert, weight = expert[slot], weight[slot]
    return Assignments(
        expert=expert,
        weight=weight,
        rows={"token": slot // (G * K), "head": slot // K, "slot": slot},
        num_rows={"token": T, "head": T * G, "slot": T * G * K},
    )


@dataclass(frozen=True)
class LocalPlan:
    """Rows and experts are on this rank. The oracle of every other plan."""

    counts: list[int]
    """Rows per expert."""
    weight: Tensor
    """[A], expert-major."""
    rows: dict[Level, Tensor]
    """[A] row of each level, expert-major."""
    num_rows: dict[Level, int]
    """Rows that each level has in all."""

    @classmethod
    @is_part("dispatch")
    def of(cls, assignments: Assignments, num_experts: int) -> LocalPlan:
        """Sort by expert, keeping the order of tokens within one."""
        order = assignments.expert.argsort(stable=True)
        return cls(
            counts=assignments.expert.bincount(minlength=num_experts).tolist(),
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
        unused = [0] * (num_experts - len(self.counts))
        return Trip(
            read=self.rows[read],
            write=self.rows[write],
            num_written=self.num_rows[write],
            counts=self.counts + unused,
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
        return LocalPlan.of(assignments_of(routing), num_experts)
