"""Activations by name, each with its slope: kernels that differentiate by hand need both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise function."""

    value: Callable[[Tensor], Tensor]
    """x to its activation."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the activation, x) to the gradient of x."""


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "gelu": Activation(F.gelu, lambda grad, x: _aten.gelu_backward(grad, x)),
    "silu": Activation(F.silu, lambda grad, x: _aten.silu_backward(grad, x)),
}
"""By the name in the configuration."""
