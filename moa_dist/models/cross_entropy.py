"""Cross-entropy that never holds the logits of all tokens in fp32.

Its gradient comes from the logits as they are, chunk by chunk, and their logsumexp: one buffer in
the type of the logits is all that the backward pass allocates.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NO_TARGET = -100
"""In the place of a token where nothing is to be predicted."""

_CHUNK = 2**26
"""Number of logits that are widened at a time."""


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum the cross-entropy of logits [T, V] and `targets` [T] int64 over tokens with a target.

    Returns a scalar in nats, in fp32 or wider. Smoothing mixes the targets with the uniform
    distribution, as `torch.nn.functional.cross_entropy` does.
    """
    loss: Tensor
    loss, _ = _CrossEntropy.apply(logits, targets, label_smoothing, False)
    return loss


def cross_entropy_and_z(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and, over the same tokens, the sum of the squared logsumexp.

    The latter keeps logits near the size of log-probabilities (PaLM, Chowdhery et al. 2022, section
    5). It needs no other pass over the logits.
    """
    loss, z = _CrossEntropy.apply(logits, targets, label_smoothing, True)
    return loss, z


def _rows_per_chunk(logits: Tensor) -> int:
    return max(_CHUNK // logits.shape[1], 1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, smoothing: float, with_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        counts = targets != NO_TARGET
        index = targets.where(counts, 0)[:, None]
        size = _rows_per_chunk(logits)
        log_sums, losses = [], []
        for part, index_of_part in zip(logits.split(size), index.split(size), strict=True):
            values = part.to(wide)
            log_sums.append(values.logsumexp(-1))
            loss = log_sums[-1] - (1 - smoothing) * values.gather(1, index_of_part).squeeze(1)
            if smoothing:
                loss -= smoothing * values.mean(-1)
            losses.append(loss)
        log_sum = torch.cat(log_sums)
        ctx.save_for_backward(logits, index, counts, log_sum)
        ctx.smoothing = smoothing
        z = log_sum.where(counts, 0).square().sum() if with_z else None
        return torch.cat(losses).where(counts, 0).sum(), z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, index, counts, log_sum = ctx.saved_tensors
        smoothing, size = ctx.smoothing, _rows_per_chunk(logits)
        grad = torch.empty_like(logits)
        of_loss, of_z = grads
        assert of_loss is not None
        slopes = (of_loss * counts).to(log_sum.dtype)[:, None]
        pulls = None if of_z is None else (2 * of_z * counts * log_sum)[:, None].split(size)
        parts = (x.split(size) for x in (grad, logits, index, log_sum, slopes))
        for i, (out, part, *rest) in enumerate(zip(*parts, strict=True)):
            index_of_part, log_sum_of_part, slope = rest
            values = (part - log_sum_of_part[:, None]).exp_()
            pulled = None if pulls is None else values * pulls[i]
            if smoothing:
                values -= smoothing / logits.shape[1]
            # Not by adding, which torch takes for an operation without a fixed order.
            values.scatter_(1, index_of_part, values.gather(1, index_of_part) - (1 - smoothing))
            if pulled is None:
                torch.mul(values, slope, out=out)
            else:
                out.copy_(pulled.addcmul_(values, slope))
        return grad, None, None, None
