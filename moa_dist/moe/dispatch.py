"""Dispatch and combine: one operation behind every routed projection, local or over ranks.

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
from moa_dist.moe.router import Routing

Level = Literal["token", "head", "slot"]


class DispatchPlan(Protocol):
    """How the rows of one routing travel to the experts of this rank and back.

    An immutable value: one plan serves several trips, as MoA's queries and outputs. A trip is
    begun by `dispatch` or `combine` and over when its result is waited for; computation between
    the two overlaps it.
    """

    @property
    def counts(self) -> list[int]:
        """Rows per local expert; they sum to A."""
        ...

    def dispatch(self, x: Tensor, read: Level) -> Arriving:
        """Rows [rows of `read`, D] of this rank -> [A, D] in expert-major order."""
        ...

    def combine(self, rows: Tensor, write: Level, *, weighted: bool) -> Arriving:
        """Expert outputs [A, D] -> [rows of `write`, D] of this rank.

        Sums the rows of each output row in fp32 or wider, weighted by the router if asked; sums
        that travel between ranks do so in the type of `rows`.
        Dropped assignments and padding contribute zero.
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
    """Gather rows into expert-major order; sum them back. The oracle of every other plan."""

    counts: list[int]
    """Rows per expert."""
    weight: Tensor
    """[A], expert-major."""
    rows: dict[Level, Tensor]
    """[A] row of each level, expert-major."""
    num_rows: dict[Level, int]
    """Rows that each level has in all."""

    @classmethod
    def of(cls, assignments: Assignments, num_experts: int) -> LocalPlan:
        """Sort by expert, keeping the order of tokens within one."""
        order = assignments.expert.argsort(stable=True)
        return cls(
            counts=assignments.expert.bincount(minlength=num_experts).tolist(),
            weight=assignments.weight[order],
            rows={level: rows[order] for level, rows in assignments.rows.items()},
            num_rows=assignments.num_rows,
        )

    def dispatch(self, x: Tensor, read: Level) -> Arriving:
        """See `DispatchPlan.dispatch`."""
        return here(self.expand(x, read))

    def combine(self, rows: Tensor, write: Level, *, weighted: bool) -> Arriving:
        """See `DispatchPlan.combine`."""
        return here(self.reduce(rows, write, weighted=weighted))

    def expand(self, x: Tensor, read: Level) -> Tensor:
        """Rows [rows of `read`, D] -> [A, D] in expert-major order."""
        return x.index_select(0, self.rows[read])

    def reduce(self, rows: Tensor, write: Level, *, weighted: bool) -> Tensor:
        """Expert outputs [A, D] -> [rows of `write`, D], summed as `DispatchPlan.combine` says."""
        wide = rows.to(self.weight.dtype)
        if weighted:
            wide = wide * self.weight[:, None]
        return sum_rows(wide, self.rows[write], self.num_rows[write]).to(rows.dtype)


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, D] with `out[i]` the sum of `rows[a]` [A, D] over all a with index[a] = i."""
    return rows.new_zeros(num_rows, rows.shape[-1]).index_add(0, index, rows)


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are on this rank."""

    def plan(self, routing: Routing, num_experts: int) -> LocalPlan:
        """See `Dispatcher.plan`."""
        return LocalPlan.of(assignments_of(routing), num_experts)
