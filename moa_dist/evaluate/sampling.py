"""Draws the next token from a model's logits.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Configures and draws samples of the next token."""

    temperature: float = 1.0
    """Divisor of the logits; 0 always takes the most probable token."""
    top_k: int | None = None
    """Draw only from this many most probable tokens; None for all."""
    top_p: float = 1.0
    """Draw only from the smallest set of those tokens whose share of the probability reaches this
    (nucleus sampling, Holtzman et al. 2020, section 3.1); 1 for all."""

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """Draw a token id given logits on the CPU."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        # Subtract the maximum first: a tiny temperature must not make it infinite.
        probabilities_V = ((logits_V - logits_V.max()) / self.temperature).softmax(0)
        ordered, ids = probabilities_V.sort(descending=True, stable=True)
        ordered = ordered[: self.top_k]
        ordered = ordered / ordered.sum()
        more_probable = ordered.cumsum(0) - ordered
        more_probable[0] = -1.0  # the first is kept even when top_p is 0
        kept = ordered.where(more_probable < self.top_p, 0.0)
        return int(ids[torch.multinomial(kept, 1, generator=generator)])
