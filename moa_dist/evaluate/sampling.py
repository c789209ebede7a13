"""Drawing the next token from a model's logits.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be drawn, and how often."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token every time."""
    top_k: int | None = None
    """Draw from this many of the most probable tokens; None for all."""
    top_p: float = 1.0
    """Draw from the fewest of those that together have this share of their probability (Holtzman
    et al. 2020, section 3.1); 1 for all."""

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """A token by its logits, which are on the CPU."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        # The maximum goes first: a tiny temperature must not make it infinite.
        probabilities_V = ((logits_V - logits_V.max()) / self.temperature).softmax(0)
        ordered, ids = probabilities_V.sort(descending=True, stable=True)
        ordered = ordered[: self.top_k]
        ordered = ordered / ordered.sum()
        more_probable = ordered.cumsum(0) - ordered
        more_probable[0] = -1.0  # the first is kept even when top_p is 0
        kept = ordered.where(more_probable < self.top_p, 0.0)
        return int(ids[torch.multinomial(kept, 1, generator=generator)])
