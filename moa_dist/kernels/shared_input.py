"""Linear maps of the same rows, of which a GPU computes the gradients in common products.

The gradient of the rows would otherwise be written once per map, and added up in passes over all
of them; and the gradients of the weights would read the rows once each. Here the backward pass of
a map only leaves the gradient of its result, and when all maps have done so, one product of these
side by side serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.kernels.gradient_sum import GradientSum, alias, sum_of, wide_product
from moa_dist.kernels.hardware import Hardware


class Term(NamedTuple):
    """What the backward pass of one map leaves."""

    grad: Tensor
    """[T, O], gradient of the result."""
    weight: Tensor
    """[O, I]."""
    total: GradientSum | None
    """Where the gradient of the weight goes; None if the map returns that itself."""


class _Share(torch.autograd.Function):
    """The identity; the gradient is that of all maps of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: list[Term], *handles: Tensor) -> Tensor:
        # The handles' sums are complete only after this node, not after the maps.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.terms, ctx.num_handles = terms, len(handles)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (grad,), terms = grads, list(ctx.terms)
        ctx.terms.clear()
        rows = x.flatten(0, -2)
        total = None if grad is None else grad.flatten(0, -2)
        for group in _groups(terms):
            joint, weights = group[0].grad, group[0].weight
            if len(group) > 1:
                joint = torch.cat([term.grad for term in group], 1)
                weights = torch.cat([term.weight for term in group])
            _add_weights(joint, rows, group)
            total = joint @ weights if total is None else torch.addmm(total, joint, weights)
        return None if total is None else total.view_as(x), *[None] * (1 + ctx.num_handles)


def _groups(terms: list[Term]) -> list[list[Term]]:
    """Put side by side terms narrower than x: another pass over the gradient of x costs more."""
    narrow = [term for term in terms if term.weight.shape[0] < term.weight.shape[1]]
    wide = [[term] for term in terms if term.weight.shape[0] >= term.weight.shape[1]]
    return [narrow, *wide] if narrow else wide


def _add_weights(joint: Tensor, x: Tensor, terms: list[Term]) -> None:
    """Add to the sums that terms have the gradients of their weights."""
    totals = [term.total for term in terms]
    if totals[0] is not None and len(terms) == 1:
        totals[0].add_product(joint.T, x)
    elif any(totals):
        of_weights = wide_product(joint.T, x).split([term.grad.shape[1] for term in terms])
        for total, gradient in zip(totals, of_weights, strict=True):
            if total is not None:
                total.add(gradient)


_ATTRIBUTE = "terms_of_gradient"


def share(x: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """Return x [..., I] for use by several maps, on GPUs with gradients in common.

    `weights` include those of all maps. If ZeRO 3 has not gathered them, nothing is in common, as
    it would free them before they are needed.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if Hardware.of(x.device).device_type != "cuda":
        return x
    weights = list(weights)
    if any(weight.numel() == 0 for weight in weights):
        return x
    handles = [handle for handle, _ in map(sum_of, weights) if handle is not None]
    terms: list[Term] = []
    shared: Tensor = _Share.apply(x, terms, *handles)
    setattr(shared, _ATTRIBUTE, terms)
    return shared


def terms_of(x: Tensor) -> list[Term] | None:
    """Return the list to which a map of `x` appends; None if the gradient of x is its own."""
    if torch.compiler.is_compiling():
        return None
    found: list[Term] | None = getattr(x, _ATTRIBUTE, None)
    return found


def backward_of_map(
    grad: Tensor, x: Tensor, weight: Tensor, total: GradientSum | None, terms: list[Term] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of x [..., I] and weight [O, I], given that of `x @ weight.T`.

    None for those that go elsewhere, to `terms` or to `total`.
    """
    rows, of_weight = grad.flatten(0, -2), None
    inputs = x.flatten(0, -2).to(grad.dtype)
    if total is None:
        of_weight = (rows.T @ inputs).to(weight.dtype)
    elif terms is None:
        total.add_product(rows.T, inputs)
    if terms is None:
        return (grad @ weight.to(grad.dtype)).to(x.dtype), of_weight
    terms.append(Term(rows.to(x.dtype), weight.to(x.dtype), total))
    return None, of_weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        handle: Tensor | None,
        total: GradientSum | None,
        terms: list[Term] | None,
    ) -> Tensor:
        # The weight itself, not an alias: ZeRO 3 frees it between the passes.
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.terms = total, terms
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *backward_of_map(grads[0], x, weight, ctx.total, ctx.terms), None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ weight.T + bias` in the type of x [..., I] for weight [O, I]."""
    (handle, total), terms = sum_of(weight), terms_of(x)
    if total is None and terms is None:
        return F.linear(x, weight.to(x.dtype), bias)
    y: Tensor = _Linear.apply(x, weight, handle, total, terms)
    return y if bias is None else y + alias(bias)
