"""RMoE's router: it carries a state from layer to layer (Qiu et al. 2024, arXiv 2408.06793).

The recurrence runs over the layers for each token, never over time: a token's state is a function
of that token's own vectors. Code: qiuzh20/RMoE.

Shapes: B sequences of S tokens, D model width, R width of the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moa_dist.config.family import RecurrentRouterConfig
from moa_dist.kernels.gradient_sum import alias
from moa_dist.moe.initialize import Constant, Initializer, Normal
from moa_dist.moe.router import Choice, Router, Routing
from moa_dist.moe.router_logits import RouterLogits
from moa_dist.moe.token_state import RouterState


class RecurrentCell(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) in fp32 or wider, one for all layers of a stack.

    Rows of its weights are those of the reset gate, the update gate and the new state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        init = Normal(1 / math.sqrt(width))
        self.input = RouterLogits(width, 3 * width, init)
        self.past = RouterLogits(width, 3 * width, init)
        self.input_bias = nn.Parameter(torch.empty(3 * width))
        self.past_bias = nn.Parameter(torch.empty(3 * width))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of its own parameters."""
        return {"input_bias": Constant(0.0), "past_bias": Constant(0.0)}

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        """x [B, S, R] and the state before, 0 if None -> state [B, S, R]."""
        of_input = self.input(x)
        of_past = alias(self.past_bias).to(of_input.dtype)
        of_input = of_input + alias(self.input_bias).to(of_input.dtype)
        if past is not None:
            of_past = self.past(past) + of_past
        reset, update, new = of_input.chunk(3, dim=-1)
        of_reset, of_update, of_new = of_past.chunk(3, dim=-1)
        update = (update + of_update).sigmoid()
        new = (new + (reset + of_reset).sigmoid() * of_new).tanh()
        state: Tensor = new - update * new
        return state if past is None else state + update * past


class RecurrentRouter(Router):
    """The top K of logits of a state that the router of the layer before began."""

    config: RecurrentRouterConfig
    of_all_layers = ("cell",)

    def __init__(
        self,
        config: RecurrentRouterConfig,
        d_model: int,
        *,
        num_groups: int = 1,
        init: Initializer | None = None,
    ) -> None:
        super().__init__(config, config.d_state, num_groups=num_groups)
        init = init or Normal(1 / math.sqrt(d_model))
        self.project = RouterLogits(d_model, config.d_state, init)
        self.cell = RecurrentCell(config.d_state)

    def macs(self, num_tokens: int) -> int:
        """Count multiply-accumulates of one application."""
        layers = (self.project, self.cell.input, self.cell.past)
        own = sum(layer.weight.numel() for layer in layers)
        return super().macs(num_tokens) + num_tokens * own

    def _decide(
        self, x_BSD: Tensor, token_mask: Tensor | None, choice: Choice | None, state: RouterState
    ) -> Routing:
        """Implement `Router._decide`; the routing has the state for the next layer."""
        now = self.cell(self.project(x_BSD), state.past)
        return super()._decide(now, token_mask, choice, state)._replace(state=now)
