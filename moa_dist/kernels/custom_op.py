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
from moa_dist.kernels.gradient_sum import Into, sum_of
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from moa_dist.kernels.saved import Gradients, Saved, alloc_saved, fresh
from moa_dist.profiling import annotated

Operands = tuple[ExpertWeights, Tensor, RowMap]
Outputs = tuple[Tensor, Tensor, list[Tensor]]

_ROWS = "Tensor {0}, Tensor {0}_order, Tensor? {0}_offsets, SymInt num_{0}"
_OPERANDS = (
    "Tensor x, Tensor down, Tensor[] ups, str activation, "
    f"{_ROWS.format('read')}, {_ROWS.format('write')}, "
    "Tensor counts, bool is_dropless, Tensor? weight, bool recompute"
)


def custom_op_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `routed_experts` by the fused kernel of the device; gathers no [A, D] or [A, O].

    Raises:
        ValueError: the counts do not fit (on a CPU; other devices do not look at them).
    """
    handles = [handle for handle, _ in map(sum_of, experts.tensors()) if handle is not None]
    y: Tensor = _forward(*_flatten(experts, x, row_map), handles)[0]
    return y


def _flatten(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Any, ...]:
    read, write, *rest = row_map
    return x, experts.down, list(experts.ups), experts.activation, *read, *write, *rest


def _restore(x: Tensor, down: Tensor, ups: list[Tensor], activation: str, *rest: Any) -> Operands:
    n = len(Rows._fields)
    row_map = RowMap(Rows(*rest[:n]), Rows(*rest[n : 2 * n]), *rest[2 * n :])
    return ExpertWeights(down, tuple(ups), activation), x, row_map


def _forward_of(kernel: Callable[..., tuple[Tensor, Saved]]) -> Callable[..., Outputs]:
    def run(*flat_and_handles: Any) -> Outputs:
        *flat, _ = flat_and_handles  # handles are for autograd only
        y, saved = kernel(*_restore(*flat))
        return y, saved.outputs, list(saved.products)

    return run


def _backward_of(kernel: Callable[..., Gradients]) -> Callable[..., tuple[Any, ...]]:
    def run(grad: Tensor, outputs: Tensor, products: list[Tensor], *flat: Any) -> tuple[Any, ...]:
        result = kernel(grad, *_restore(*flat), Saved(outputs, tuple(products)))
        return result.x, result.weight, result.down, list(result.ups)

    return run


def _summing_backward_of(kernel: Callable[..., Gradients]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        out: list[Tensor],
        total: list[Tensor | None],
        grad: Tensor,
        outputs: Tensor,
        products: list[Tensor],
        *flat: Any,
    ) -> tuple[Tensor, Tensor]:
        saved, into = Saved(outputs, tuple(products)), tuple(map(Into, out, total))
        result = kernel(grad, *_restore(*flat), saved, into)
        return result.x, result.weight

    return run


def _fake_forward(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Tensor, Saved]:
    y = x.new_empty(row_map.write.num, experts.down.shape[2])
    return y, alloc_saved(experts, x, row_map)


def _fake_backward(
    grad: Tensor,
    experts: ExpertWeights,
    x: Tensor,
    row_map: RowMap,
    saved: Saved,
    into: tuple[Into, ...] | None = None,
) -> Gradients:
    down, *ups = (to.out for to in into or fresh(experts))
    of_weight = x.new_empty(0) if row_map.weight is None else torch.empty_like(row_map.weight)
    return Gradients(torch.empty_like(x), of_weight, down, tuple(ups))


_forward = torch.library.custom_op(
    "moa_dist::routed",
    _forward_of(cpu_blocked.forward),
    mutates_args=(),
    device_types="cpu",
    schema=f"({_OPERANDS}, Tensor[] handles) -> (Tensor, Tensor, Tensor[])",
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

_summing_backward = torch.library.custom_op(
    "moa_dist::routed_summing_backward",
    _summing_backward_of(cpu_blocked.backward),
    mutates_args=("out",),
    device_types="cpu",
    schema=(
        "(Tensor(a!)[] out, Tensor?[] total, Tensor grad, Tensor outputs, Tensor[] products, "
        f"{_OPERANDS}) -> (Tensor, Tensor)"
    ),
)
_summing_backward.register_kernel("cuda")(_summing_backward_of(triton_fused.backward))
_summing_backward.register_fake(_summing_backward_of(_fake_backward))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *flat, handles = inputs
    experts, x, row_map = _restore(*flat)
    _, outputs, products = output
    ctx.set_materialize_grads(False)  # else zeros are made as gradients of what is only saved
    of_rows = (*row_map.read[:3], *row_map.write[:3])
    tensors = (x, experts.down, row_map.counts, row_map.weight, *of_rows)
    kept = () if row_map.recompute else (outputs, *products)
    ctx.save_for_backward(*tensors, *experts.ups, *kept)
    ctx.num_ups, ctx.activation = len(experts.ups), experts.activation
    ctx.is_dropless, ctx.recompute = row_map.is_dropless, row_map.recompute
    ctx.nums = row_map.read.num, row_map.write.num
    ctx.num_handles = len(handles)
    ctx.sums = [total for _, total in map(sum_of, experts.tensors())] if handles else None


@annotated("experts")
def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, down, counts, weight, *saved = ctx.saved_tensors
    read, write = (
        Rows(ids, order, offsets, num)
        for num, (ids, order, offsets) in zip(ctx.nums, (saved[:3], saved[3:6]), strict=True)
    )
    ups, kept = saved[6 : 6 + ctx.num_ups], saved[6 + ctx.num_ups :]
    experts = ExpertWeights(down, tuple(ups), ctx.activation)
    row_map = RowMap(read, write, counts, ctx.is_dropless, weight, ctx.recompute)
    flat = _flatten(experts, x, row_map)
    if ctx.recompute:
        _, outputs, products = _forward(*flat, [])
    else:
        outputs, *products = kept
    grad_down, grad_ups = None, [None] * len(ups)
    if ctx.sums is None:
        grad_x, grad_weight, grad_down, grad_ups = _backward(grad, outputs, products, *flat)
    else:
        pairs = zip(ctx.sums, experts.tensors(), strict=True)
        out, total = map(list, zip(*(s.into(matrix) for s, matrix in pairs), strict=True))
        grad_x, grad_weight = _summing_backward(out, total, grad, outputs, products, *flat)
    # In the order of `_OPERANDS`; of the row map, which comes last, only `weight` has a gradient.
    of_row_map = (*[None] * (len(flat) - 6), None if weight is None else grad_weight, None)
    return grad_x, grad_down, grad_ups, None, *of_row_map, [None] * ctx.num_handles


_forward.register_autograd(_differentiate, setup_context=_save)
