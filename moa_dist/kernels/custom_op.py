"""The operator of routed experts: opaque to torch's compiler, differentiable, one per device.

A kernel is two functions, a forward and a backward; what they have in common is here: what is
saved between them, the shapes of all results, and autograd. Shapes as in `row_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moa_dist.kernels import cpu_blocked, triton_fused
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.kernels.saved import alloc_saved
from moa_dist.profiling import annotated


def custom_op_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """`routed_experts` by the device's kernel; holds [A, F] only.

    Raises:
        ValueError: the counts do not fit (on a CPU; elsewhere nobody looks at them).
    """
    y, *_ = _forward(
        x,
        row_map.weight,
        experts.down,
        list(experts.ups),
        row_map.read,
        row_map.write,
        row_map.counts,
        row_map.num_output_rows,
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
    num_output_rows: int,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return cpu_blocked.forward(
        x, weight, down, ups, read, write, counts, num_output_rows, activation
    )


_forward.register_kernel("cuda")(triton_fused.forward)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    num_output_rows: int,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    saved_output, products = alloc_saved(x, weight, down, ups, len(read))
    return x.new_empty(num_output_rows, down.shape[2]), saved_output, products


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
    saved_output: Tensor,
    products: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return cpu_blocked.backward(
        grad, x, weight, down, ups, read, write, counts, saved_output, products, activation
    )


_backward.register_kernel("cuda")(triton_fused.backward)


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
    saved_output: Tensor,
    products: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    grad_ups = [torch.empty_like(up) for up in ups]
    return torch.empty_like(x), grad_weight, torch.empty_like(down), grad_ups


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    x, weight, down, ups, read, write, counts, _, activation = inputs
    _, saved_output, products = output
    ctx.set_materialize_grads(False)  # else zeros stand for gradients of what is only kept
    ctx.save_for_backward(x, weight, down, read, write, counts, saved_output, *ups, *products)
    ctx.activation = activation


@annotated("experts")
def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, down, read, write, counts, saved_output, *rest = ctx.saved_tensors
    ups, products = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    grad_x, grad_weight, grad_down, grad_ups = _backward(
        grad, x, weight, down, ups, read, write, counts, saved_output, products, ctx.activation
    )
    routing = None if weight is None else grad_weight
    return grad_x, routing, grad_down, grad_ups, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
