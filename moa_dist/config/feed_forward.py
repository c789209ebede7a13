"""Feed-forward part of a model: dense or of experts; `config/family.py` has kinds of relatives.

A new kind is a subclass of `FFNConfig`, which knows its routers, its experts and how to shrink; a
module; and a line in `moa_dist.models.kinds`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import PositiveInt, SerializeAsAny

from moa_dist.config.parts import PartConfig
from moa_dist.config.routers import RouterConfig, shrunk
from moa_dist.config.section import Kind, Section

_SHRUNK_WIDTH, _SHRUNK_D_FF = 8, 32


ActivationName = Literal["relu", "gelu", "silu", "relu_squared"]


class FFNConfig(PartConfig):
    """The family of feed-forward kinds."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    activation: ActivationName = "relu"
    """Nonlinearity; `relu_squared` is the square of a ReLU (So et al. 2021, Primer)."""
    gated: bool = False
    """Multiply the activation by a second linear projection (GLU)."""
    bias: bool = False
    """Add biases to all projections, of each expert its own."""


class DenseFFNConfig(FFNConfig):
    """Two-layer feed-forward network."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width."""

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow the hidden layer."""
        return self.changed(d_ff=shrunk(self.d_ff, _SHRUNK_D_FF))


class SharedExpertConfig(Section):
    """An expert that every token uses, next to those that the router chooses for it."""

    d_expert: PositiveInt
    """Hidden width; several shared experts of DeepSeek-V3 are one of their joint width."""
    sigmoid_gate: bool = False
    """Weigh its output by the sigmoid of a linear map of what the router reads (Qwen2-MoE)."""


class MoEFFNConfig(FFNConfig):
    """Mixture of feed-forward experts: sigma-MoE with sigmoid scores, or softmax MoE."""

    kind: Literal["moe"] = "moe"
    """Names this kind."""
    d_expert: PositiveInt
    """Hidden width of one expert."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each token."""
    shared_expert: SharedExpertConfig | None = None
    """An expert that every token uses, with the same `activation` and `gated`; null for none. Every
    rank holds it."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    def shrink(self, expert_parallel: int) -> Self:
        """Keep fewer and narrower experts."""
        shared = self.shared_expert
        if shared is not None:
            shared = shared.changed(d_expert=shrunk(shared.d_expert, _SHRUNK_WIDTH))
        d_expert = shrunk(self.d_expert, _SHRUNK_WIDTH)
        result = super().shrink(expert_parallel)
        return result.changed(d_expert=d_expert, shared_expert=shared)
