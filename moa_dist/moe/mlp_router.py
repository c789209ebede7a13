"""A router whose logits have a hidden layer (ModuleFormer, Shen et al. 2023, arXiv 2306.04640)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.family import MLPRouterConfig
from moa_dist.kernels.gradient_sum import alias
from moa_dist.moe.initialize import Constant, Initializer, Normal
from moa_dist.moe.router import Choice, Router, Routing
from moa_dist.moe.router_logits import RouterLogits

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "relu": F.relu,
}


class MLPLogits(nn.Module):
    """`W_2 act(W_1 x + b)` in fp32 or wider."""

    def __init__(
        self, d_model: int, d_hidden: int, num_outputs: int, activation: str, init: Initializer
    ) -> None:
        super().__init__()
        self.hidden = RouterLogits(d_model, d_hidden, init)
        self.bias = nn.Parameter(torch.empty(d_hidden))
        self.activation = _ACTIVATIONS[activation]
        self.out = RouterLogits(d_hidden, num_outputs, Normal(1 / math.sqrt(d_hidden)))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of its own parameter."""
        return {"bias": Constant(0.0)}

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, outputs]."""
        hidden = self.hidden(x_TD)
        logits: Tensor = self.out(self.activation(hidden + alias(self.bias).to(hidden.dtype)))
        return logits


class MLPRouter(Router):
    """The top K of logits that have a hidden layer."""

    config: MLPRouterConfig

    def _make_logits(self, d_model: int, init: Initializer) -> nn.Module:
        """Implement `Router._make_logits`."""
        config = self.config
        return MLPLogits(d_model, config.d_hidden, self.num_experts, config.activation, init)

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Implement `Router._route`."""
        routing = super()._route(logits, token_mask, num_sequence_groups, choice)
        if self.config.gate_eps is None:
            return routing
        weights = routing.topk_weights
        total = weights.sum(-1, keepdim=True) + self.config.gate_eps
        return routing._replace(topk_weights=weights / total)
