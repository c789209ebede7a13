"""Same configuration, same numbers: run after run, and at the start of every layout."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from moa_dist.checkpoint.format import MASTER
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import (
    AS_IF_LARGE,
    SWITCHHEAD,
    Case,
    micro_batches,
    router,
)

Pieces = list[tuple[str, int, Tensor]]


def engine_of(case: Case) -> Engine:
    config, mesh = case.config(), make_mesh(case.expert_parallel)
    model = build_model(
        config.model,
        recompute=case.recompute,
        parallelize=lambda m: shard_experts(m, mesh, config.parallel.expert_exchange),
    )
    return Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)


def masters(engine: Engine) -> Pieces:
    return [
        (f.parameter, f.start, f.view.clone())
        for f in engine.state.fragments(owned_only=True)
        if f.state == MASTER
    ]


def several_steps(case: Case, seed: int) -> tuple[list[tuple[float, float, int]], Pieces]:
    """On every rank: loss, norm and drops of each step, and the parameters at the end."""
    engine = engine_of(case)
    values = []
    for step in range(4):
        torch.manual_seed(1000 * seed + 10 * step + engine.mesh.rank)
        result = engine.step(micro_batches(case, engine.mesh), lr=1e-2)
        dropped = sum(int(r.dropped.sum()) for r in result.routing.values())
        values.append((result.loss, result.grad_norm, dropped))
    pieces = masters(engine)
    engine.close()
    return values, pieces


def same(ours: Pieces, theirs: Pieces) -> bool:
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True)
    )


CAPACITY = {"factor": 0.8, "policy": "probability"}
DROPPING = {
    "attention": SWITCHHEAD | {"router": router(5, 2, expert_dropout=0.2, capacity=CAPACITY)},
    "ffn": {
        "kind": "moe",
        "d_expert": 8,
        "router": router(7, 2, expert_dropout=0.2, capacity=CAPACITY, balance={"entropy": 0.1}),
    },
}


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_runs_are_bit_identical(pools, zero_stage, exchange):
    case = Case(
        zero_stage=zero_stage,
        precision="fp32",
        optimizer="adamw",
        clip_norm=0.1,
        exchange=exchange,
        recompute=True,
        model=DROPPING,
    )
    first, second, other = (pools(2).run(several_steps, case, seed) for seed in (0, 0, 1))
    for rank in range(2):
        assert first[rank][0] == second[rank][0]
        assert same(first[rank][1], second[rank][1])
        assert all(dropped > 0 for _, _, dropped in first[rank][0])
        assert first[rank][0] != other[rank][0], "expert dropout was on"


def initial(case: Case) -> Pieces:
    engine = engine_of(case)
    pieces = masters(engine)
    engine.close()
    return pieces


@pytest.mark.pairwise
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "exchange"),
    [
        (1, 1, "tokens"),
        (2, 1, "tokens"),
        *((2, 2, exchange) for exchange in ("tokens", "weights")),
        (4, 1, "tokens"),
        *((4, ep, exchange) for ep in (2, 4) for exchange in ("tokens", "weights")),
    ],
)
def test_every_layout_starts_from_the_same_weights(
    pools, world_size, expert_parallel, exchange, zero_stage
):
    """Bit for bit those of one process: before ZeRO's fp32 copies take their first step."""
    case = Case(
        world_size=world_size,
        expert_parallel=expert_parallel,
        exchange=exchange,
        zero_stage=zero_stage,
        precision="fp32",
    )
    whole = build_model(case.config().model).state_dict()
    held = dict.fromkeys(whole, 0)
    for name, start, values in chain.from_iterable(pools(world_size).run(initial, case)):
        assert torch.equal(values, whole[name].flatten()[start : start + len(values)]), name
        held[name] += len(values)
    assert held == {name: value.numel() for name, value in whole.items()}
