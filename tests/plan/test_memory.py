"""States are even shares of what sharded models hold, and the little with which they are padded.

`tests/distributed/test_memory.py` compares them, exactly, with DeepSpeed's tensors.
"""

from math import ceil

import pytest
import torch

from moa_dist.config import Config
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.moe.experts import expert_layers
from moa_dist.plan.exchange_choice import expected_states, layout_of
from moa_dist.plan.predicted_traffic import ALIGNMENT
from moa_dist.plan.states import sizes_of, states
from moa_dist.plan.terms import total
from tests.distributed.layouts import AS_IF_LARGE
from tests.models.test_counts import small


def shard_of_rank(config: Config, rank: int, ep: int) -> tuple[int, int]:
    """Dense and expert parameters of the model that a rank holds, sharded by hand."""
    with torch.device("meta"):
        model = LanguageModel(config.model)
    for _, layer in expert_layers(model):
        layer.shard(rank, ep)
    experts = sum(layer.weight.numel() for _, layer in expert_layers(model))
    return sum(p.numel() for p in model.parameters()) - experts, experts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "ep"), [(1, 1), (4, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_states_are_those_of_every_rank(precision, world_size, ep, stage):
    config = small(parallel={"expert_parallel": ep, "zero_stage": stage})
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"precision": precision})}
    )
    shards = [shard_of_rank(config, rank, ep) for rank in range(ep)]
    assert len(set(shards)) == 1, "ranks must hold equally much, or their buckets differ"
    dense, experts = shards[0]
    whole = dense + experts
    part = ceil(dense / world_size) + ceil(experts / (world_size // ep))
    element = {"fp32": 4, "bf16": 2, "fp64": 8}[precision]

    model = meta_model(config.model)
    layout = layout_of(config, world_size, config.parallel.expert_exchange)
    sizes = sizes_of(model, ep)
    held = states(sizes, layout, stage, config.optimizer, AS_IF_LARGE)
    found = {name: total(lines) for name, lines in held.parts().items()}
    # Stages 1 and 2 pad all dense parameters to equal even parts, and all experts; stage 3 pads
    # each parameter.
    num_parameters = len(sizes.dense) + len(sizes.experts)
    of_whole = {0: 0, 1: 2 * ALIGNMENT * world_size, 2: 2 * ALIGNMENT * world_size, 3: 0}[stage]
    of_part = {0: 0, 1: 2 * ALIGNMENT, 2: 2 * ALIGNMENT, 3: num_parameters}[stage]

    def is_padded(name: str, elements: int, padding: int, num_bytes: int) -> bool:
        return elements * num_bytes <= found[name] <= (elements + padding) * num_bytes

    if stage == 3:
        assert is_padded("parameters", part, of_part, element)
    else:
        assert is_padded("parameters", whole, of_whole, element)
    if stage == 1 and precision == "bf16":  # kept in both types
        assert is_padded("gradients", whole, of_whole, 2 + 4)
    elif stage == 2 and precision == "fp32":  # whole parameters of which a rank has a part
        assert part * 4 <= found["gradients"] <= whole * 4
    elif stage >= 2:
        assert is_padded("gradients", part, of_part, 4)
    else:
        assert found["gradients"] == whole * (4 if stage else element)
    if stage:
        assert is_padded("moments", part, of_part, 2 * 4)
        assert is_padded("masters", part, of_part, 4)
    else:
        assert found["moments"] == 2 * element * whole
        assert found["masters"] == 0
    assert held.total == sum(found.values())


@pytest.mark.parametrize(("momentum", "num_moments"), [(0.0, 0), (0.9, 1)])
def test_sgd_keeps_momentum_only_if_it_has_any(momentum, num_moments):
    config = small(optimizer={"kind": "sgd", "momentum": momentum}, parallel={"zero_stage": 0})
    model = meta_model(config.model)
    moments = expected_states(config, 1, model).moments
    assert total(moments) == num_moments * 4 * sum(p.numel() for p in model.parameters())
