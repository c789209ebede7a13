"""Activations by name, each with its derivative, which the fused kernels apply by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise function and its derivative."""

    value: Callable[[Tensor], Tensor]
    """Maps x to its activation."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """Maps the gradient of the activation, and x, to the gradient of x."""


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "gelu": Activation(F.gelu, lambda grad, x: _aten.gelu_backward(grad, x)),
    "silu": Activation(F.silu, lambda grad, x: _aten.silu_backward(grad, x)),
    "relu_squared": Activation(lambda x: F.relu(x).square(), lambda grad, x: grad * F.relu(2 * x)),
}
"""Keyed by the name that a configuration uses."""
