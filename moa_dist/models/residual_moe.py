"""Residual MoE: experts correct a dense part (DeepSpeed-MoE, arXiv 2201.05596, section 4.1).

The released code mixes both by two learned weights per token; the paper adds them.
"""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor

from moa_dist.config.family import ResidualMoEConfig
from moa_dist.models.feed_forward import DenseFeedForward, FFNContext, MoEFeedForward
from moa_dist.models.linear import Linear
from moa_dist.moe.initialize import Normal
from moa_dist.moe.router import Routing


class ResidualMoE(MoEFeedForward):
    """`y = c_0 MoE(x) + c_1 FFN(x)`, where c = softmax(W x + b)."""

    def __init__(self, config: ResidualMoEConfig, d_model: int, init_scale: float) -> None:
        super().__init__(config, d_model, init_scale)
        self.dense = DenseFeedForward.like(config, config.d_ff, d_model, init_scale)
        self.mix = Linear(d_model, 2, Normal(init_scale / math.sqrt(d_model)), bias=True)
        self.router.mean_names += ("weight_of_experts",)

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Add the dense part and the mix."""
        parts = Counter(super().macs(length, training=training))
        parts += Counter(self.dense.macs(length, training=training))
        return dict(parts + Counter({"projections": self.mix.macs(length)}))

    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Implement `FeedForward.transform`; the weights of the mix follow the router's input."""
        experts, routing = super().transform(x, router_input, context)
        dense = self.dense(x, router_input, context.token_mask).y
        of_experts, of_dense = self.mix(router_input).softmax(-1).to(x.dtype).split(1, dim=-1)
        y = of_experts * experts + of_dense * dense
        decided = routing[""].reporting(of_experts.flatten(0, 1), context.token_mask)
        return y, routing | {"": decided}
