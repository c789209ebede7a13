"""The causal objective of one micro-batch, scaled so that any split of a batch adds up.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.labels import part
from moa_dist.models.language_model import LanguageModelOutput


class Batch(NamedTuple):
    """Sequences with their targets: position s predicts token s + 1."""

    tokens: Tensor
    """[B, S + 1] int64."""
    real: Tensor | None = None
    """[B, S + 1] bool, false at padding; None when there is none."""

    def num_targets(self) -> int:
        """Tokens to predict, padding excluded."""
        if self.real is None:
            return self.tokens[:, 1:].numel()
        return int(self.real[:, 1:].sum())

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        real = None if self.real is None else self.real.to(device, non_blocking=True)
        return Batch(self.tokens.to(device, non_blocking=True), real)


class Objective(NamedTuple):
    """Loss of one micro-batch."""

    cross_entropy: Tensor
    """Scalar, summed over targets, nats."""
    output: LanguageModelOutput
    """What the model said."""

    def loss(self, targets_per_micro_batch: float) -> Tensor:
        """Scalar whose mean over all micro-batches of a step, on all ranks, is the step's loss.

        `targets_per_micro_batch` is the mean number of targets over them; dividing by it
        rather than by this micro-batch's own number makes every token count alike, also
        with uneven padding.
        """
        auxiliary = sum(self.output.auxiliary.values(), torch.zeros_like(self.cross_entropy))
        return self.cross_entropy / targets_per_micro_batch + auxiliary


def objective(model: nn.Module, batch: Batch) -> Objective:
    """Run the model on a micro-batch and sum the cross-entropy of its targets."""
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    output: LanguageModelOutput = model(inputs, None if batch.real is None else batch.real[:, :-1])
    with part("loss"):
        return Objective(_cross_entropy(output.logits, targets, batch), output)


def _cross_entropy(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    if batch.real is not None:
        targets = targets.masked_fill(~batch.real[:, 1:], -100)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=-100, reduction="sum"
    )
