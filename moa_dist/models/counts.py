"""Counts of a model that need not exist yet: parameters and multiply-accumulates.

A forward may take other experts in training than in evaluation, so both are counted, and a caller
has to name the one that it means.
"""

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
class Work:
    """What one forward over one sequence uses and computes, in training or in evaluation."""

    active: int
    """Parameters that one token uses: the experts that it takes, and everything else whole. A
    shared layer counts once, though its repeats may choose different experts."""
    macs: dict[str, int]
    """Multiply-accumulates by part. Attention counts all pairs of tokens, which is how the
    papers count; norms, activations and gates are left out."""
    layer_macs: dict[str, Counter[str]]
    """Multiply-accumulates of attention, of the FFN and of the rest, over all layers; each by what
    does them, such as `experts`."""

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


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, and its work for one sequence."""

    sequence_length: int
    """Number of tokens in that sequence."""
    total: int
    """Parameters; a shared layer counts once."""
    expert_tensors: tuple[ExpertTensor, ...]
    """All weights that expert parallelism shards."""
    training: Work
    """A forward in training."""
    evaluation: Work
    """A forward in evaluation, in which experts of some kinds are fewer."""

    @property
    def experts(self) -> int:
        """Parameters of attention and FFN experts."""
        return sum(tensor.num_experts * tensor.size for tensor in self.expert_tensors)

    @property
    def dense(self) -> int:
        """All other parameters, routers included."""
        return self.total - self.experts

    @property
    def flops_per_token(self) -> float:
        """Of training: 2 per multiply-accumulate, and twice the forward for gradients."""
        return 3 * 2 * self.training.total_macs / self.sequence_length


def count(config: ModelConfig, sequence_length: int) -> Counts:
    """Count by building the model on the meta device."""
    return count_model(meta_model(config), sequence_length)


def count_model(model: LanguageModel, sequence_length: int) -> Counts:
    """Count a whole model, which may be on the meta device."""
    experts = [
        ExpertTensor(layer.num_experts, layer.macs_per_row()) for _, layer in expert_layers(model)
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    return Counts(
        sequence_length=sequence_length,
        total=total,
        expert_tensors=tuple(experts),
        training=_work(model, sequence_length, total, training=True),
        evaluation=_work(model, sequence_length, total, training=False),
    )


def _work(model: LanguageModel, length: int, total: int, *, training: bool) -> Work:
    idle = 0
    for _, module in routed_modules(model):
        layers = module.held_expert_layers()
        for projection in module.routed_projections():
            router = module.router_of(projection).config
            for name in layers.keys() & set(projection.experts):
                numel = layers[name].weight.numel()
                taken = router.experts_per_token(training).mean
                idle += numel - numel * taken // router.num_experts
    return Work(
        active=total - idle,
        macs=model.macs(length, training=training),
        layer_macs=macs_of(model, length, training=training),
    )
