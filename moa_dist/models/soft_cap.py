"""A bound on logits, of attention or of a model's head: c tanh(x / c), as in Gemma 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def capped_scores(scores: Tensor, cap: float | None) -> Tensor:
    """Return scores of attention, of any shape, bounded by `cap`; None leaves them as they are."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Bound a head's `logits` of any shape in place: they are the largest of all tensors.

    The backward pass needs no more than the result, which the cross-entropy keeps anyway.
    """
    capped: Tensor = _SoftCap.apply(logits, cap)
    return capped


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        ctx.mark_dirty(logits)
        logits.div_(cap).tanh_().mul_(cap)
        ctx.save_for_backward(logits)
        ctx.cap = cap
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (capped,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grads[0], capped / ctx.cap), None
