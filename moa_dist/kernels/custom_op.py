"""The fused kernels as one operator per direction: opaque to torch.compile, and differentiable.

An operator takes tensors and plain values alone, so the operands are flattened here and nowhere
else: `_OPERANDS`, `_flatten` and `_restore` are that one list. A device's kernel is two functions,
`forward` and `backward`, of unflattened operands. Shapes as in `row_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moa_dist.kernels import cpu_blocked, triton_fused
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from moa_dist.kernels.saved import Gradients, Saved, alloc_saved
from moa_dist.profiling import annotated

Operands = tuple[ExpertWeights, Tensor, RowMap]
Outputs = tuple[Tensor, Tensor, list[Tensor]]

_ROWS = "Tensor {0}, Tensor {0}_order, Tensor? {0}_offsets, SymInt num_{0}"
_OPERANDS = (
    "Tensor x, Tensor down, Tensor[] ups, str activation, "
    f"{_ROWS.format('read')}, {_ROWS.format('write')}, "
    "Tensor counts, bool is_dropless, Tensor? weight"
)


def custom_op_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `routed_experts` by the fused kernel of the device; gathers no [A, D] or [A, O].

    Raises:
        ValueError: the counts do not fit (on a CPU; other devices do not look at them).
    """
    y: Tensor = _forward(*_flatten(experts, x, row_map))[0]
    return y


def _flatten(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Any, ...]:
    read, write, *rest = row_map
    return x, experts.down, list(experts.ups), experts.activation, *read, *write, *rest


def _restore(x: Tensor, down: Tensor, ups: list[Tensor], activation: str, *rest: Any) -> Operands:
    n = len(Rows._fields)
    row_map = RowMap(Rows(*rest[:n]), Rows(*rest[n : 2 * n]), *rest[2 * n :])
    return ExpertWeights(down, tuple(ups), activation), x, row_map


def _forward_of(kernel: Callable[..., tuple[Tensor, Saved]]) -> Callable[..., Outputs]:
    def run(*flat: Any) -> Outputs:
        y, saved = kernel(*_restore(*flat))
        return y, saved.outputs, list(saved.products)

    return run


def _backward_of(kernel: Callable[..., Gradients]) -> Callable[..., tuple[Any, ...]]:
    def run(grad: Tensor, outputs: Tensor, products: list[Tensor], *flat: Any) -> tuple[Any, ...]:
        result = kernel(grad, *_restore(*flat), Saved(outputs, tuple(products)))
        return result.x, result.weight, result.down, list(result.ups)

    return run


def _fake_forward(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Tensor, Saved]:
    y = x.new_empty(row_map.write.num, experts.down.shape[2])
    return y, alloc_saved(experts, x, row_map)


def _fake_backward(
    grad: Tensor, experts: ExpertWeights, x: Tensor, row_map: RowMap, saved: Saved
) -> Gradients:
    return Gradients(
        torch.empty_like(x),
        x.new_empty(0) if row_map.weight is None else torch.empty_like(row_map.weight),
        torch.empty_like(experts.down),
        tuple(torch.empty_like(up) for up in experts.ups),
    )


_forward = torch.library.custom_op(
    "moa_dist::routed",
    _forward_of(cpu_blocked.forward),
    mutates_args=(),
    device_types="cpu",
    schema=f"({_OPERANDS}) -> (Tensor, Tensor, Tensor[])",
)
_forward.register_kernel("cuda")(_forward_of(triton_fused.forward))
_forward.register_fake(_forward_of(_fake_forward))

_backward = torch.library.custom_op(
    "moa_dist::routed_backward",
    _backward_of(cpu_blocked.backward),
    mutates_args=(),
    device_types="cpu",
    schema=(
        f"(Tensor grad, Tensor outputs, Tensor[] products, {_OPERANDS}) "
        "-> (Tensor, Tensor, Tensor, Tensor[])"
    ),
)
_backward.register_kernel("cuda")(_backward_of(triton_fused.backward))
_backward.register_fake(_backward_of(_fake_backward))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    experts, x, row_map = _restore(*inputs)
    _, outputs, products = output
    ctx.set_materialize_grads(False)  # else zeros are made as gradients of what is only saved
    of_rows = (*row_map.read[:3], *row_map.write[:3])
    tensors = (x, experts.down, row_map.counts, row_map.weight, *of_rows)
    ctx.save_for_backward(*tensors, outputs, *experts.ups, *products)
    ctx.activation, ctx.is_dropless = experts.activation, row_map.is_dropless
    ctx.nums = row_map.read.num, row_map.write.num


@annotated("experts")
def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, down, counts, weight, *saved = ctx.saved_tensors
    read, write = (
        Rows(ids, order, offsets, num)
        for num, (ids, order, offsets) in zip(ctx.nums, (saved[:3], saved[3:6]), strict=True)
    )
    outputs, *rest = saved[6:]
    ups, products = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    experts = ExpertWeights(down, tuple(ups), ctx.activation)
    flat = _flatten(experts, x, RowMap(read, write, counts, ctx.is_dropless, weight))
    grad_x, grad_weight, grad_down, grad_ups = _backward(grad, outputs, products, *flat)
    # In the order of `_OPERANDS`; of the row map, which comes last, only `weight` has a gradient.
    of_row_map = (*[None] * (len(flat) - 5), None if weight is None else grad_weight)
    return grad_x, grad_down, grad_ups, None, *of_row_map


_forward.register_autograd(_differentiate, setup_context=_save)
