"""Residual MoE: experts correct a dense part (DeepSpeed-MoE, arXiv 2201.05596, section 4.1).

The released code mixes both by two learned weights per token; the paper adds them.
"""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor

from moa_dist.config.family import ResidualMoEConfig
from moa_dist.config.model import DenseFFNConfig
from moa_dist.models.feed_forward import DenseFeedForward, MoEFeedForward
from moa_dist.models.linear import Linear
from moa_dist.moe.initialize import Normal
from moa_dist.moe.routed_module import Gathered
from moa_dist.moe.router import Routing
from moa_dist.moe.token_state import TokenState


class ResidualMoE(MoEFeedForward):
    """`y = c_0 MoE(x) + c_1 FFN(x)`, where c = softmax(W x + b)."""

    def __init__(self, config: ResidualMoEConfig, d_model: int, init_scale: float) -> None:
        super().__init__(config, d_model, init_scale)
        dense = DenseFFNConfig(
            d_ff=config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
        )
        self.dense = DenseFeedForward(dense, d_model, init_scale)
        self.mix = Linear(d_model, 2, Normal(init_scale / math.sqrt(d_model)), bias=True)
        self.router.mean_names += ("weight_of_experts",)

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Add the dense part and the mix."""
        parts = Counter(super().macs(length, training=training))
        parts += Counter(self.dense.macs(length, training=training))
        return dict(parts + Counter({"projections": self.mix.macs(length)}))

    def transform(
        self,
        x: Tensor,
        router_input: Tensor,
        token_mask: Tensor | None,
        gathered: Gathered,
        state: TokenState,
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Implement `FeedForward.transform`; the weights of the mix follow the router's input."""
        experts, routing = super().transform(x, router_input, token_mask, gathered, state)
        dense = self.dense(x, router_input, token_mask).y
        of_experts, of_dense = self.mix(router_input).softmax(-1).to(x.dtype).split(1, dim=-1)
        y = of_experts * experts + of_dense * dense
        decided = routing[""].reporting(of_experts.flatten(0, 1), token_mask)
        return y, routing | {"": decided}
