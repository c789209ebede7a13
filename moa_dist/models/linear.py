"""Linear maps and biases that declare their initial distribution and count their work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.kernels.gradient_sum import alias
from moa_dist.kernels.shared_input import linear
from moa_dist.moe.initialize import Constant, Initializer


class Linear(nn.Linear):
    """`nn.Linear` with a declared initial distribution; a bias starts at zero."""

    def __init__(self, d_in: int, d_out: int, init: Initializer, *, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.init = init

    def reset_parameters(self) -> None:
        """Do nothing: `moe.initialize` fills parameters once the whole model is built."""

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter."""
        return {"weight": self.init, "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return linear(x, self.weight, self.bias)

    def macs(self, num_rows: int) -> int:
        """Count multiply-accumulates for `num_rows` rows."""
        return num_rows * self.in_features * self.out_features


class Bias(nn.Module):
    """Adds a learned vector, initially zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(width))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter."""
        return {"value": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return x + alias(self.value)
