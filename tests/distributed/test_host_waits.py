"""How often two ranks that share experts would wait for their GPUs."""

from functools import partial
from typing import Any

import pytest
import torch

from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch, objective
from moa_dist.moe.sharding import shard_experts
from tests.fake_cuda.host_waits import host_waits
from tests.models.small import small_config

LAYERS, PLANS_PER_LAYER = 2, {"switchhead": 3, "moa": 2}


def waits_of_a_micro_batch(
    attention: str, exchanged: str, padded: bool, recompute: bool
) -> dict[str, Any]:
    mesh = make_mesh(2)
    exchange = ExpertExchangeConfig(attention=exchanged, ffn=exchanged)
    model = build_model(
        small_config(attention=attention, ffn="moe", num_layers=LAYERS),
        recompute=recompute,
        parallelize=partial(shard_experts, mesh=mesh, exchange=exchange, overlap=True),
    ).train()
    tokens = torch.arange(18).view(2, 9) % 7
    mask = torch.arange(9) < torch.tensor([[9], [6]]) if padded else None
    with host_waits() as forward:
        result = objective(model, Batch(tokens, mask))
    with host_waits() as backward:
        result.loss(8.0).backward()
    return {"forward": forward, "backward": backward}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", PLANS_PER_LAYER)
def test_one_wait_per_plan_where_tokens_are_sent(pools, attention, padded):
    num_plans = LAYERS * PLANS_PER_LAYER[attention]
    for waits in pools(2).run(waits_of_a_micro_batch, attention, "tokens", padded, False):
        assert waits["forward"].total() == num_plans, waits
        assert not waits["backward"], waits


def test_a_second_pass_plans_again(pools):
    for waits in pools(2).run(waits_of_a_micro_batch, "moa", "tokens", False, True):
        assert waits["forward"].total() == waits["backward"].total() == LAYERS * 2, waits


@pytest.mark.parametrize("attention", PLANS_PER_LAYER)
def test_no_wait_where_weights_are_gathered(pools, attention):
    for padded in (False, True):
        for waits in pools(2).run(waits_of_a_micro_batch, attention, "weights", padded, False):
            assert not waits["forward"], waits
            assert not waits["backward"], waits
