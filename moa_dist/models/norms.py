"""Norms whose gradients can be summed over the repeats of a shared layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.kernels.gradient_sum import alias


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` for layers that may be applied several times."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        weight, bias = map(alias, (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` for layers that may be applied several times."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        weight = alias(self.weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
