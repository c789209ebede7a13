"""Computes validation loss: mean cross-entropy over held-out sequences, equal in any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from moa_dist.config.model import ModelConfig
from moa_dist.data.manifest import AnyManifest
from moa_dist.models.objective import Batch, objective


class Perplexity(NamedTuple):
    """Holds the result of a validation."""

    loss: float
    """Mean cross-entropy per target, in nats."""
    tokens: int
    """Number of targets."""

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def combined(results: Sequence[Perplexity]) -> Perplexity:
    """Combine the results of several folders: every target counts the same."""
    total = sum(result.tokens for result in results)
    loss = sum(result.loss * (result.tokens / max(total, 1)) for result in results)
    return Perplexity(loss, total)


def bits_per_byte(
    results: Sequence[Perplexity], model: ModelConfig, manifests: Sequence[AnyManifest]
) -> float | None:
    """Convert the loss over all folders to bits per byte of their text, given their manifests.

    None for a masked model, which sees most of the text.
    """
    if model.objective == "masked":
        return None
    together = combined(results)
    bytes_per_token = sum(
        manifest.bytes_per_token * (result.tokens / max(together.tokens, 1))
        for result, manifest in zip(results, manifests, strict=True)
    )
    return together.loss / math.log(2) / bytes_per_token if bytes_per_token else None


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Perplexity:
    """Evaluate `model` in evaluation mode on this rank's batches, and sum over all ranks.

    Every rank must pass the same number of batches. Collective if a process group exists.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        result = objective(model, batch.to(device))
        sums[0] += result.cross_entropy.double()
        sums[1] += batch.num_targets()
    if dist.is_initialized():
        dist.all_reduce(sums)
    model.train(was_training)
    total, tokens_seen = sums.tolist()
    return Perplexity(total / max(tokens_seen, 1), int(tokens_seen))
