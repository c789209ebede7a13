"""Counts of a model that need not exist yet: parameters and multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from moa_dist.config.model import ModelConfig
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.models.stack_counts import macs_of
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.routed_module import routed_modules

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp64": 8}
"""Bytes of an element of weights and activations, by `train.precision`."""


class ExpertTensor(NamedTuple):
    """One grouped weight: `num_experts` matrices of `size` parameters each."""

    num_experts: int
    """Experts of all router groups."""
    size: int
    """Parameters of one expert."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, and the work of one forward over one sequence."""

    sequence_length: int
    """Number of tokens in that sequence."""
    total: int
    """Parameters; a shared layer counts once."""
    active: int
    """Parameters that one token uses: `top_k` of the experts, and everything else whole. A
    shared layer counts once, though its repeats may choose different experts."""
    expert_tensors: tuple[ExpertTensor, ...]
    """All weights that expert parallelism shards."""
    macs: dict[str, int]
    """Multiply-accumulates by part. Attention counts all pairs of tokens, which is how the
    papers count; norms, activations and gates are left out."""
    layer_macs: dict[str, Counter[str]]
    """Those of attention, of the FFN and of the rest of all layers, each by what does them."""

    @property
    def experts(self) -> int:
        """Parameters of attention and FFN experts."""
        return sum(tensor.num_experts * tensor.size for tensor in self.expert_tensors)

    @property
    def dense(self) -> int:
        """All other parameters, routers included."""
        return self.total - self.experts

    @property
    def head_macs(self) -> int:
        """Multiply-accumulates of the output head."""
        return self.macs["head"]

    @property
    def total_macs(self) -> int:
        """All multiply-accumulates."""
        return sum(self.macs.values())

    @property
    def block_macs(self) -> int:
        """Multiply-accumulates without the output head's, as in the papers' tables."""
        return self.total_macs - self.head_macs

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 2 per multiply-accumulate, and twice the forward for gradients."""
        return 3 * 2 * self.total_macs / self.sequence_length


def count(config: ModelConfig, sequence_length: int) -> Counts:
    """Count by building the model on the meta device."""
    return count_model(meta_model(config), sequence_length)


def count_model(model: LanguageModel, sequence_length: int) -> Counts:
    """Count a whole model, which may be on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [
        ExpertTensor(layer.num_experts, layer.macs_per_row()) for _, layer in expert_layers(model)
    ]
    idle = 0
    for _, module in routed_modules(model):
        layers = module.held_expert_layers()
        for projection in module.routed_projections():
            router = module.router_of(projection).config
            for name in layers.keys() & set(projection.experts):
                numel = layers[name].weight.numel()
                idle += numel - numel * router.chosen // router.num_experts
    return Counts(
        sequence_length=sequence_length,
        total=total,
        active=total - idle,
        expert_tensors=tuple(experts),
        macs=model.macs(sequence_length),
        layer_macs=macs_of(model, sequence_length),
    )
