"""Sequences that belong together, since a router counts them as one group."""

from __future__ import annotations

from math import lcm

from moa_dist.config.model import ModelConfig


def sequences_per_group(model: ModelConfig) -> int:
    """Sequences that all routers of a model count together."""
    return lcm(*(router.group_sequences for router in model.routers().values()))


def whole_groups(num_sequences: int, model: ModelConfig) -> int:
    """Round a number of sequences up to whole groups."""
    group = sequences_per_group(model)
    return -(-num_sequences // group) * group
