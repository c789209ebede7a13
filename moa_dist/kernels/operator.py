"""The operator of routed experts: opaque to torch's compiler, differentiable, one per device.

A kernel is two functions, a forward and a backward; what they have in common is here: what is
saved between them, the shapes of all results, and autograd. Shapes as in `trip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moa_dist.kernels import in_parts, tiles
from moa_dist.kernels.saved import room_to_save
from moa_dist.kernels.trip import Experts, Trip
from moa_dist.labels import is_part


def routed_operator(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`routed_experts` by the device's kernel; holds [A, F] only.

    Raises:
        ValueError: the counts do not fit (on a CPU; elsewhere nobody looks at them).
    """
    y, *_ = _forward(
        x,
        trip.weight,
        experts.down,
        list(experts.ups),
        trip.read,
        trip.write,
        trip.counts,
        trip.num_written,
        experts.activation,
    )
    return y


@torch.library.custom_op("moa_dist::routed", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    num_written: int,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return in_parts.forward(x, weight, down, ups, read, write, counts, num_written, activation)


_forward.register_kernel("cuda")(tiles.forward)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    num_written: int,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    kept, products = room_to_save(x, weight, down, ups, len(read))
    return x.new_empty(num_written, down.shape[2]), kept, products


@torch.library.custom_op("moa_dist::routed_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    kept: Tensor,
    products: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return in_parts.backward(
        grad, x, weight, down, ups, read, write, counts, kept, products, activation
    )


_backward.register_kernel("cuda")(tiles.backward)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    kept: Tensor,
    products: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    grad_ups = [torch.empty_like(up) for up in ups]
    return torch.empty_like(x), grad_weight, torch.empty_like(down), grad_ups


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    x, weight, down, ups, read, write, counts, _, activation = inputs
    _, kept, products = output
    ctx.set_materialize_grads(False)  # else zeros stand for gradients of what is only kept
    ctx.save_for_backward(x, weight, down, read, write, counts, kept, *ups, *products)
    ctx.activation = activation


@is_part("experts")
def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, down, read, write, counts, kept, *rest = ctx.saved_tensors
    ups, products = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    grad_x, grad_weight, grad_down, grad_ups = _backward(
        grad, x, weight, down, ups, read, write, counts, kept, products, ctx.activation
    )
    routing = None if weight is None else grad_weight
    return grad_x, routing, grad_down, grad_ups, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
