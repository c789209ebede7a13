"""The operands that all kernels of routed experts share: the experts, and which rows they take.

Shapes in this package:
    X: rows of the input, from which experts read
    Y: rows of the result, to which they add
    A: assignments of a row to an expert, sorted by expert; `a` is some consecutive ones
    E: experts; `e` is some consecutive ones
    D, F, O: input, hidden and output width of an expert
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.activations import ACTIVATIONS


class ExpertWeights(NamedTuple):
    """The matrices of all experts, and the function between them.

    An expert computes `rows @ down` without `ups`, `act(rows @ ups[0]) @ down` with one of them,
    and `(act(rows @ ups[0]) * (rows @ ups[1])) @ down`, the gated form, with two.
    """

    down: Tensor
    """[E, F, O]; [E, D, O] without `ups`."""
    ups: tuple[Tensor, ...] = ()
    """None, one or two, each [E, D, F]."""
    activation: str = "relu"
    """Name in `ACTIVATIONS`; ignored without `ups`."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all matrices, `down` first."""
        return (self.down, *self.ups)


class Rows(NamedTuple):
    """The rows that assignments read from or write to, and which assignments share one.

    What is gathered by `ids` is summed back by `order` and `offsets`: every row adds up its own
    assignments, so sums need no atomics and have a fixed order.
    """

    ids: Tensor
    """[A] int64, the row of each assignment."""
    order: Tensor
    """[A] int64, the assignments sorted by row."""
    offsets: Tensor | None
    """[num + 1] int64, where the assignments of each row begin in `order`; None if every row has
    A / num of them."""
    num: int
    """Number of rows."""

    @classmethod
    def of(cls, ids: Tensor, num: int) -> Rows:
        """Sort the assignments to rows `ids` [A]. Never waits for an accelerator."""
        ordered, order = ids.sort(stable=True)
        return cls(ids, order, starts_of(ordered, num), num)

    def are_permuted(self) -> bool:
        """Whether every row has exactly one assignment."""
        return self.offsets is None and len(self.ids) == self.num


def starts_of(ordered: Tensor, num: int) -> Tensor:
    """Return where each of `num` rows begins in the sorted vector `ordered`: [num + 1]."""
    return torch.searchsorted(ordered, torch.arange(num + 1, device=ordered.device))


class RowMap(NamedTuple):
    """Assignments of input rows to experts and output rows: parallel vectors, sorted by expert.

    Assignments without an expert (dropped tokens, padding) come last and contribute nothing. All
    shapes are therefore known without reading the counts, which would make the host wait for an
    accelerator.
    """

    read: Rows
    """The input row of each assignment."""
    write: Rows
    """The output row of each assignment."""
    counts: Tensor
    """[E] int64 assignments per expert; they sum to at most A."""
    is_dropless: bool
    """Whether they sum to A."""
    weight: Tensor | None
    """[A] in fp32 or wider, a factor for each assignment's result; None for no factor."""
    recompute: bool = False
    """Whether fused kernels compute again in the backward pass what they would keep otherwise."""


def hidden_rows(products: tuple[Tensor, ...], activation: str) -> Tensor:
    """Return the hidden rows [A, F], which `down` multiplies, from the products with `ups`."""
    active = ACTIVATIONS[activation].value(products[0])
    return active if len(products) == 1 else active * products[1]


def sum_type(x: Tensor) -> torch.dtype:
    """Return the type in which rows of `x`'s type are summed: fp32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
