"""The parts of a model that are watched separately while it learns."""

from __future__ import annotations

from enum import Enum

from torch import nn

from moa_dist.models.block import Block
from moa_dist.models.parameter_roles import Role, parameter_roles
from moa_dist.moe.experts import expert_layers


class Part(Enum):
    """A kind of parameters whose gradients and updates are reported together."""

    DENSE = "dense"
    """What every token uses: dense layers, embeddings, norms, biases, the head."""
    ATTENTION_EXPERTS = "attention_experts"
    """Experts of attention, self-attention and cross-attention alike."""
    FFN_EXPERTS = "ffn_experts"
    """Experts of feed-forward layers."""
    ROUTERS = "routers"
    """Routers."""


def parameter_parts(model: nn.Module) -> dict[str, Part]:
    """Return the part of every parameter, by name in model order."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    ffns = tuple(f"{name}.ffn." for name in blocks)
    experts = {f"{name}.weight" for name, _ in expert_layers(model)}

    def part(name: str, role: Role) -> Part:
        if role is Role.ROUTER:
            return Part.ROUTERS
        if name not in experts:
            return Part.DENSE
        return Part.FFN_EXPERTS if name.startswith(ffns) else Part.ATTENTION_EXPERTS

    return {name: part(name, role) for name, role in parameter_roles(model).items()}
