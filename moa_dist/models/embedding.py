"""The table of token vectors, which may serve as the head too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moa_dist.kernels.embedding import embedding
from moa_dist.kernels.shared_input import linear
from moa_dist.moe.initialize import Initializer, Normal


class TokenEmbedding(nn.Module):
    """Unscaled token embedding that can also serve as the output head."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter."""
        return {"weight": Normal(1 / math.sqrt(self.weight.shape[1]))}

    def forward(self, x: Tensor) -> Tensor:
        """Ids [B, S] -> vectors [B, S, D]; or vectors [B, S, D] -> logits [B, S, V].

        Both uses are calls of this module: what shards parameters gathers them per call.
        """
        return (linear if x.is_floating_point() else embedding)(x, self.weight)
