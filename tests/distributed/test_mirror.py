"""A rank among mirror images sends what it would among real ranks with the same tokens."""

from functools import partial
from typing import Any

import pytest

from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.mirror import mirrored_job
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.language_model import build_model, meta_model
from moa_dist.models.objective import Batch, objective
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.exchange_choice import expected_traffic
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, router

MODELS = {
    "moeut": {},
    "moa": {"attention": MOA | {"router": router(6, 2, "softmax")}, "norm_placement": "pre"},
}


def forward_and_backward(
    case: Case, mesh: Any
) -> tuple[dict[TrafficKey, TrafficVolume], dict[str, int]]:
    """What this rank sent, and elements of the gradients of its experts."""
    config = case.config()
    exchange = config.parallel.expert_exchange
    model = build_model(
        config.model, parallelize=partial(shard_experts, mesh=mesh, exchange=exchange)
    )
    mesh.traffic_counter.take()
    # The same on every rank.
    tokens = case.batch().tokens[: case.micro_batch]
    result = objective(model, Batch(tokens))
    result.loss(tokens.numel()).backward()
    gradients = {}
    for name, layer in expert_layers(model):
        assert layer.weight.grad is not None, name
        assert layer.weight.grad.isfinite().all(), name
        gradients[name] = layer.weight.grad.numel()
    return mesh.traffic_counter.take(), gradients


def on_rank(case: Case) -> tuple[dict[TrafficKey, TrafficVolume], dict[str, int]]:
    return forward_and_backward(case, make_mesh(case.expert_parallel))


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("expert_parallel", [2, 4])
def test_sizes_are_those_of_real_ranks(pools, expert_parallel, model, exchange):
    """In the first attention: later routers see rows of experts that a mirror image has not."""
    case = Case(
        world_size=4,
        expert_parallel=expert_parallel,
        padded=False,
        skewed=True,
        exchange=exchange,
        model=model | {"num_layers": 1, "num_distinct_layers": 1},
    )

    def of_attention(sent: dict[TrafficKey, TrafficVolume]) -> dict[TrafficKey, TrafficVolume]:
        return {f: v for f, v in sent.items() if f.layer.endswith(".attention")}

    for rank, (real, gradients) in enumerate(pools(4).run(on_rank, case)):
        with mirrored_job(rank, 4):
            mirrored, of_mirror = forward_and_backward(case, make_mesh(expert_parallel))
        assert of_attention(mirrored) == of_attention(real)
        assert of_mirror == gradients


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize(("rank", "expert_parallel"), [(0, 8), (517, 64), (1023, 1024)])
def test_one_of_1024_ranks_sends_what_is_planned(rank, expert_parallel, exchange):
    """Where every token takes all experts, the plan needs no router to know it."""
    size = max(16, expert_parallel)
    case = Case(
        world_size=1024,
        expert_parallel=expert_parallel,
        sequences=1024 * 2,
        padded=False,
        precision="fp32",
        exchange=exchange,
        model={
            "num_layers": 2,
            "num_distinct_layers": 1,
            "attention": SWITCHHEAD | {"router": router(size // 2, size // 2, "softmax")},
            "ffn": {"kind": "moe", "d_expert": 8, "router": router(size, size, "softmax")},
        },
    )
    config = case.config()
    with mirrored_job(rank, 1024):
        sent, gradients = forward_and_backward(case, make_mesh(expert_parallel))
    model = meta_model(config.model)
    planned = expected_traffic(config, 1024, config.parallel.expert_exchange, model)
    assert sent == {
        key: TrafficVolume(volume.messages // 1024, volume.num_bytes // 1024)
        for key, volume in planned.items()
    }
    assert gradients == {
        name: -(-layer.num_experts // expert_parallel) * layer.macs_per_row()
        for name, layer in expert_layers(model)
    }
