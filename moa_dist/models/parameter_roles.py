"""Which parameters an optimizer treats alike."""

from __future__ import annotations

from enum import Enum

from torch import nn

from moa_dist.models.block import Block
from moa_dist.models.embedding import TokenEmbedding
from moa_dist.models.linear import Linear
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.router import Router
from moa_dist.moe.router_logits import RouterLogits


class Role(Enum):
    """What a parameter is for."""

    MATRIX = "matrix"
    """Weight matrix [d_out, d_in] of a layer, or those of its experts [E, d_in, d_out]."""
    ROUTER = "router"
    """Parameter of a router, or of the gate of a shared expert."""
    EMBEDDING = "embedding"
    """Embedding, or the head."""
    VECTOR = "vector"
    """Norm or bias."""


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter, by name in model order."""
    modules = dict(model.named_modules())
    blocks = _names_of(modules, Block)
    routers = _names_of(modules, (Router, RouterLogits))

    def role(name: str) -> Role:
        owner, _, leaf = name.rpartition(".")
        if name.startswith(routers):
            return Role.ROUTER
        if leaf == "weight" and isinstance(modules[owner], (Linear, GroupedLinear)):
            return Role.MATRIX if name.startswith(blocks) else Role.EMBEDDING
        return Role.EMBEDDING if isinstance(modules[owner], TokenEmbedding) else Role.VECTOR

    return {name: role(name) for name, _ in model.named_parameters()}


def _names_of(
    modules: dict[str, nn.Module], kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> tuple[str, ...]:
    """Return the names of all modules of some kinds, with a dot behind each."""
    return tuple(f"{name}." for name, module in modules.items() if isinstance(module, kinds))
