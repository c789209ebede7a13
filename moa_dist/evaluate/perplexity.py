"""Validation: mean cross-entropy over held-out sequences, in any layout the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moa_dist.models.objective import Batch, objective


class Perplexity(NamedTuple):
    """Result of a validation."""

    loss: float
    """Mean cross-entropy per target, nats."""
    tokens: int
    """Targets."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits of cross-entropy per byte of the source text."""
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def perplexity(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Perplexity:
    """Evaluate `model`, in evaluation mode, on this rank's batches; sums over all ranks.

    `batches` yields tokens [B, S + 1] int64 and, per sequence, whether it counts [B] bool:
    every rank must bring the same number of batches, so short ones are filled up.
    Collective if a process group exists.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, counts in batches:
        real = counts[:, None].expand_as(tokens)
        batch = Batch(tokens, None if bool(counts.all()) else real)
        result = objective(model, batch.to(device))
        sums[0] += result.cross_entropy.double()
        sums[1] += batch.num_targets()
    if dist.is_initialized():
        dist.all_reduce(sums)
    model.train(was_training)
    total, tokens_seen = sums.tolist()
    return Perplexity(total / max(tokens_seen, 1), int(tokens_seen))
