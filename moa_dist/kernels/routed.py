"""Routed experts: gather rows, multiply each by its expert's matrices, add them up.

Two ways with one result. `routed_in_parts` is for CPUs: it takes a few experts at a time, so that
the rows it gathers are still in the cache when they are multiplied and added to the result, and
never holds all of them; its backward goes in the same order. `routed_at_once` gathers all rows,
as a grouped matrix product of an accelerator needs them, and is the oracle of the other.

Shapes: X rows to read, Y rows to write, A assignments sorted by expert, E experts, D input, F
hidden and O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.labels import is_part

_PART_BYTES = 4 << 20
"""Gathered rows per part: with the experts' matrices and as many results they should fit a cache
shared by a few cores."""


class Experts(NamedTuple):
    """What each expert does to its rows: `activation(rows @ up, ...) @ down`, or `rows @ down`."""

    down: Tensor
    """[E, F, O]; [E, D, O] without `ups`."""
    ups: tuple[Tensor, ...] = ()
    """Each [E, D, F]."""
    activation: Callable[..., Tensor] | None = None
    """Elementwise, from as many [A, F] as there are `ups` to [A, F]."""

    def matrices(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.down, *self.ups)

    def hidden(self, *products: Tensor) -> Tensor:
        """[A, F] from the rows' products with `ups`."""
        assert self.activation is not None
        return self.activation(*products)


class Trip(NamedTuple):
    """From which rows to which: parallel vectors of length A, sorted by expert."""

    read: Tensor
    """int64 rows of the input."""
    write: Tensor
    """int64 rows of the result."""
    num_written: int
    """Y."""
    counts: list[int]
    """[E] assignments per expert; they sum to A."""
    weight: Tensor | None
    """[A] in fp32 or wider; None for no weights."""


@is_part("experts")
def routed_experts(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`y[write[a]] += weight[a] * expert(x[read[a]])` over all assignments a: [X, D] -> [Y, O].

    Sums in fp32 or wider, returns the type of `x`. Differentiable in x, the weights and all
    matrices; an expert without rows gets a zero gradient. Deterministic on CPUs.
    """
    if sum(trip.counts) != len(trip.read):
        raise ValueError(f"{len(trip.read)} rows, but counts for {sum(trip.counts)}")
    if x.device.type == "cpu":
        return routed_in_parts(experts, x, trip)
    return routed_at_once(experts, x, trip)


def because(device: torch.device) -> str:
    """Which way `routed_experts` goes on `device`, and why."""
    if device.type == "cpu":
        return "routed_in_parts, because on a CPU rows should be used while they are in its cache"
    return "routed_at_once, because an accelerator wants all rows in one grouped matrix product"


def routed_at_once(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`routed_experts` step by step under autograd; holds [A, D] and [A, O]."""
    return add_up(multiply(experts, gather(x, trip), trip.counts), trip)


def gather(x: Tensor, trip: Trip) -> Tensor:
    """[X, D] -> [A, D] in the order of experts."""
    return x.index_select(0, trip.read)


def multiply(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """[A, D] -> [A, O], each row by its expert."""
    if experts.ups:
        rows = experts.hidden(*(grouped_matmul(rows, up, counts) for up in experts.ups))
    return grouped_matmul(rows, experts.down, counts)


def add_up(rows: Tensor, trip: Trip) -> Tensor:
    """[A, O] -> [Y, O], weighted."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if trip.weight is not None:
        wide = wide * trip.weight[:, None]
    y = wide.new_zeros(trip.num_written, wide.shape[-1])
    return y.index_add(0, trip.write, wide).to(rows.dtype)


def routed_in_parts(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`routed_experts` by a few experts at a time; holds [A, F] only.

    Weights multiply the narrower side of `down`. That of the hidden rows is where
    `<y_a, grad>`, the gradient of a weight, costs least as well.
    """
    result: Tensor = _RoutedInParts.apply(
        x, trip.weight, experts.down, trip, experts.activation, *experts.ups
    )
    return result


class _Part(NamedTuple):
    """Consecutive experts and their rows."""

    experts: slice
    rows: slice
    counts: list[int]


def _parts(counts: list[int], row_bytes: int) -> tuple[list[_Part], int]:
    """All experts, a cacheful at a time, and the largest number of rows in one part."""
    limit = max(_PART_BYTES // row_bytes, 1)
    parts: list[_Part] = []
    first = start = size = 0
    for expert, count in enumerate([*counts, limit]):
        if expert == len(counts) or (size and size + count > limit):
            rows = slice(start, start + size)
            parts.append(_Part(slice(first, expert), rows, counts[first:expert]))
            first, start, size = expert, start + size, 0
        size += count
    return parts, max(part.rows.stop - part.rows.start for part in parts)


def _multiply(
    rows: Tensor, matrices: Tensor, counts: list[int], out: Tensor, *, add: bool = False
) -> Tensor:
    """Rows [a, I] sorted by expert, times their expert's matrix [e, I, O]: set `out` [a, O], or
    add to it."""
    for group, matrix, result in zip(
        rows.split(counts), matrices.unbind(), out.split(counts), strict=True
    ):
        torch.addmm(result, group, matrix, beta=int(add), out=result)
    return out


def _outer(left: Tensor, right: Tensor, counts: list[int], out: Tensor) -> None:
    """`left.T @ right` of each expert's rows [a, I] and [a, O] -> `out` [e, I, O].

    Zeros for an expert without rows.
    """
    for a, b, result in zip(left.split(counts), right.split(counts), out.unbind(), strict=True):
        torch.mm(a.T, b, out=result)


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [a, W] times weights [a], in the type of the rows."""
    return (rows * weight[:, None]).to(rows.dtype)


class _RoutedInParts(torch.autograd.Function):
    """See `routed_in_parts`.

    Buffers for one part serve all parts: fresh memory costs more than the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        down: Tensor,
        trip: Trip,
        activation: Callable[..., Tensor] | None,
        *ups: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        parts, most = _parts(trip.counts, max(x.shape[1], down.shape[2]) * x.element_size())
        narrows = down.shape[1] > down.shape[2]
        gathered = x.new_empty(most, x.shape[1])
        results = x.new_empty(most, down.shape[2])
        # What backward would else compute again: products before the activation, or the results,
        # each only where it is the narrow side.
        A = len(trip.read)
        products = [x.new_empty(A, up.shape[2]) for up in ups]
        kept = None if weight is None or not narrows else x.new_empty(A, down.shape[2])
        y = x.new_zeros(trip.num_written, down.shape[2], dtype=wide)
        for experts, rows, counts in parts:
            n = rows.stop - rows.start
            hidden = torch.index_select(x, 0, trip.read[rows], out=gathered[:n])
            if ups:
                hidden = Experts(down, ups, activation).hidden(
                    *(
                        _multiply(hidden, up[experts], counts, product[rows])
                        for up, product in zip(ups, products, strict=True)
                    )
                )
            if weight is not None and not narrows:
                hidden = _scaled(hidden, weight[rows])
            out = results[:n] if kept is None else kept[rows]
            out = _multiply(hidden, down[experts], counts, out)
            if weight is not None and narrows:
                out = out * weight[rows, None]
            y.index_add_(0, trip.write[rows], out.to(wide))
        ctx.save_for_backward(x, weight, down, trip.read, trip.write, kept, *ups, *products)
        ctx.parts, ctx.most, ctx.activation = parts, most, activation
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    @is_part("experts")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, read, write, kept, *rest = ctx.saved_tensors
        ups, products = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        wide = torch.promote_types(x.dtype, torch.float32)
        gathered = x.new_empty(ctx.most, x.shape[1])
        gathered_grad = x.new_empty(ctx.most, down.shape[2])
        hidden_grad = x.new_empty(ctx.most, down.shape[1])
        grad_x = torch.zeros_like(x, dtype=wide)
        grad_weight: Any = None if weight is None else torch.empty_like(weight)
        grad_down, grad_ups = torch.empty_like(down), [torch.empty_like(up) for up in ups]
        for experts, rows, counts in ctx.parts:
            n = rows.stop - rows.start
            from_x = hidden = torch.index_select(x, 0, read[rows], out=gathered[:n])
            grad_y = torch.index_select(grad, 0, write[rows], out=gathered_grad[:n])
            if ups:
                with torch.enable_grad():
                    part = [product[rows].requires_grad_() for product in products]
                    active = ctx.activation(*part)
                hidden = active.detach()
            weighs_hidden = grad_weight is not None and kept is None
            if kept is not None:
                torch.sum(kept[rows].to(wide) * grad_y, -1, out=grad_weight[rows])
                grad_y = torch.mul(grad_y, weight[rows, None], out=grad_y)
            scaled = _scaled(hidden, weight[rows]) if weighs_hidden else hidden
            _outer(scaled, grad_y, counts, grad_down[experts])
            grad_h = _multiply(grad_y, down[experts].mT, counts, hidden_grad[:n])
            if weighs_hidden:
                torch.sum(hidden.to(wide) * grad_h, -1, out=grad_weight[rows])
                grad_h = torch.mul(grad_h, weight[rows, None], out=grad_h)
            grad_rows = grad_h
            if ups:
                grad_products = torch.autograd.grad(active, part, grad_h)
                for grad_product, grad_up in zip(grad_products, grad_ups, strict=True):
                    _outer(from_x, grad_product, counts, grad_up[experts])
                grad_rows = from_x  # which is not needed any more
                for i, (grad_product, up) in enumerate(zip(grad_products, ups, strict=True)):
                    _multiply(grad_product, up[experts].mT, counts, grad_rows, add=i > 0)
            grad_x.index_add_(0, read[rows], grad_rows.to(wide))
        return grad_x.to(x.dtype), grad_weight, grad_down, None, None, *grad_ups
