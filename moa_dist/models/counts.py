"""Counts of a model that need not exist yet: parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch

from moa_dist.config.model import ModelConfig
from moa_dist.config.run import Config, OptimizerConfig
from moa_dist.models.language_model import LanguageModel
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.routed_module import routed_modules

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Bytes of an element of weights and activations, by `train.precision`."""
_MASTER_BYTES = 4


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
    with torch.device("meta"):
        model = LanguageModel(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [
        ExpertTensor(layer.num_experts, layer.macs_per_row()) for _, layer in expert_layers(model)
    ]
    idle = 0
    for _, module in routed_modules(model):
        layers = module.expert_layers()
        for projection in module.routed_projections():
            router = module.router_of(projection).config
            for name in projection.experts:
                numel = layers[name].weight.numel()
                idle += numel - numel * router.top_k // router.num_experts
    return Counts(
        sequence_length=sequence_length,
        total=total,
        active=total - idle,
        expert_tensors=tuple(experts),
        macs=model.macs(sequence_length),
    )


@dataclass(frozen=True)
class States:
    """Bytes that each rank holds from step to step.

    Without activations, communication buffers, and the few elements with which partitions
    are padded.
    """

    num_parameters: int
    """Elements of `parameters`."""
    parameters: int
    """What forward and backward compute with."""
    gradients: int
    """Of the parameters, before the optimizer step."""
    optimizer: int
    """AdamW's two moments, SGD's momentum if it has any."""
    master: int
    """ZeRO's fp32 copy of the parameters, which it updates."""

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.gradients + self.optimizer + self.master


def states(counts: Counts, config: Config, world_size: int) -> States:
    """States under `config.parallel`, `train.precision` and `optimizer` on `world_size` ranks.

    `parallel.expert_parallel` must divide `world_size`.
    """
    ep, stage = config.parallel.expert_parallel, config.parallel.zero_stage
    # Dense state is partitioned over all ranks, expert state over those with the same experts.
    shard = sum(ceil(tensor.num_experts / ep) * tensor.size for tensor in counts.expert_tensors)
    whole = counts.dense + shard
    partition = ceil(counts.dense / world_size) + ceil(shard / (world_size // ep))
    element = ELEMENT_BYTES[config.train.precision]
    # At stages 1 to 3 gradients are summed in fp32, and DeepSpeed 0.19 keeps master and moments
    # in fp32, a master copy even of fp32 parameters. Stage 0 updates parameters in place.
    updated = _MASTER_BYTES if stage else element
    held = partition if stage == 3 else whole
    return States(
        num_parameters=held,
        parameters=held * element,
        gradients=(partition if stage >= 2 else whole) * updated,
        optimizer=(partition if stage else whole) * updated * _num_moments(config.optimizer),
        master=partition * _MASTER_BYTES if stage else 0,
    )


def _num_moments(optimizer: OptimizerConfig) -> int:
    """Values that the optimizer keeps per parameter."""
    if optimizer.kind == "adamw":
        return 2
    return 1 if optimizer.momentum else 0
