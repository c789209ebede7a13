"""What every kernel of routed experts is given: what experts do, and which rows they take.

Shapes: X rows to read, Y rows to write, A assignments sorted by expert, E experts, D input, F
hidden and O output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.activations import ACTIVATIONS


class ExpertWeights(NamedTuple):
    """What each expert does to its rows.

    `rows @ down` without `ups`, else `act(rows @ ups[0]) @ down`, or with two of them, gated:
    `(act(rows @ ups[0]) * (rows @ ups[1])) @ down`.
    """

    down: Tensor
    """[E, F, O]; [E, D, O] without `ups`."""
    ups: tuple[Tensor, ...] = ()
    """None, one or two, each [E, D, F]."""
    activation: str = "relu"
    """Name in `ACTIVATIONS`; means nothing without `ups`."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.down, *self.ups)


class RowMap(NamedTuple):
    """From which rows to which: parallel vectors of length A, sorted by expert.

    Assignments that no expert takes (dropped ones, padding) come last and contribute nothing. So
    all shapes are known without a look at the counts, which would make the host wait for an
    accelerator.
    """

    read: Tensor
    """int64 rows of the input."""
    write: Tensor
    """int64 rows of the result."""
    num_output_rows: int
    """Y."""
    counts: Tensor
    """[E] int64 assignments per expert; their sum is at most A."""
    is_dropless: bool
    """Whether the sum is A."""
    weight: Tensor | None
    """[A] in fp32 or wider; None for no weights."""


def hidden_rows(products: tuple[Tensor, ...], activation: str) -> Tensor:
    """What `down` multiplies, [A, F], from the products with one or two `ups`."""
    active = ACTIVATIONS[activation].value(products[0])
    return active if len(products) == 1 else active * products[1]


def sum_type(x: Tensor) -> torch.dtype:
    """Type in which rows are added up: fp32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
