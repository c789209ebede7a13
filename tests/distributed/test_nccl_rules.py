"""Layouts keep NCCL's rules, and take the step of one process under them."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moa_dist.train.engine import Engine
from tests.distributed import nccl_rules
from tests.distributed.layouts import (
    MOA,
    Case,
    assert_equal,
    distributed,
    on_rank,
    one_process,
    router,
)
from tests.distributed.nccl_rules import difference, no_objects
from tests.distributed.pool import Pool

BOUND = 1e-5


@pytest.fixture(scope="module")
def rule_pools():
    """Pool by number of ranks whose collectives obey NCCL's rules."""
    started: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in started:
            started[world_size] = Pool(world_size, nccl_rules.install)
        return started[world_size]

    yield get
    for pool in started.values():
        pool.close()


def guarded_on_rank(case: Case) -> Any:
    """Runs on every rank of a pool: `on_rank`, with no collective of objects in a step."""
    take_step = Engine.step

    def step(*args: Any, **keywords: Any) -> Any:
        with no_objects():
            return take_step(*args, **keywords)

    nccl_rules.take()
    with mock.patch.object(Engine, "step", step):
        return on_rank(case)


class Guarded:
    """A pool that guards what it runs."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def run(self, _: Any, case: Case) -> list[Any]:
        return self.pool.run(guarded_on_rank, case)


DENSE = {
    "attention": {"kind": "dense", "num_heads": 2, "d_head": 8},
    "ffn": {"kind": "dense", "d_ff": 24},
}
MIXTURE = {
    "num_distinct_layers": None,
    "attention": MOA | {"router": router(5, 2, "softmax")},
    "ffn": {"kind": "moe", "d_expert": 8, "router": router(7, 2)},
}
MODELS: dict[str, dict[str, Any]] = {"dense": DENSE, "moa": MIXTURE, "moeut": {}}
LAYOUTS = {
    "ep 1": Case(expert_parallel=1),
    "ep 2, tokens": Case(),
    "ep 2, tokens, overlap, recomputed": Case(overlap=True, recompute=True),
    "ep 2, weights, overlap": Case(exchange="weights", overlap=True),
    "W 4, ep 2, tokens, overlap": Case(world_size=4, overlap=True, micro_batch=1),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_keeps_the_rules(rule_pools, zero_stage, model, layout):
    precision = "fp64" if zero_stage == 0 else "fp32"
    case = replace(
        LAYOUTS[layout],
        zero_stage=zero_stage,
        precision=precision,
        clip_norm=0.1,
        model=MODELS[model],
        steps=1,
    )
    if model == "dense":
        case = replace(case, expert_parallel=1, exchange="tokens", overlap=False)
    ours = distributed(lambda world_size: Guarded(rule_pools(world_size)), case)
    assert_equal(ours, one_process(case), BOUND)
    logs, broken, unfinished = zip(*rule_pools(case.world_size).run(nccl_rules.take), strict=True)
    assert all(len(log) > 1 for log in logs)
    assert not any(broken), broken
    assert not any(unfinished)
    assert difference(logs) is None


def break_a_rule(rule: str) -> list[str]:
    """Runs on every rank of a pool: break a rule; returns what was noticed."""
    nccl_rules.take()
    tensor = torch.ones(4)
    match rule:
        case "write":
            work = dist.all_reduce(tensor, async_op=True)
            tensor.add_(1)
            work.wait()
        case "write to what is sent":
            out = torch.empty(4)
            work = dist.all_to_all_single(out, tensor, async_op=True)
            tensor.add_(1)
            work.wait()
        case "read":
            work = dist.all_reduce(tensor, async_op=True)
            early = tensor.sum().isnan()
            work.wait()
            assert torch.equal(tensor, torch.full((4,), 2.0))
            return ["read"] * int(early)
        case "type":
            with suppress(RuntimeError):  # gloo minds as well
                dist.all_reduce(torch.ones(4, dtype=torch.int16))
        case "layout":
            with suppress(RuntimeError):
                dist.all_reduce(torch.ones(4, 2).T)
        case "reduction":
            dist.all_reduce(torch.ones(4, dtype=torch.int64), op=dist.ReduceOp.BXOR)
    return nccl_rules.take()[1]


@pytest.mark.parametrize(
    "rule", ["write", "write to what is sent", "read", "type", "layout", "reduction"]
)
def test_a_broken_rule_is_noticed(rule_pools, rule):
    assert all(len(noticed) == 1 for noticed in rule_pools(2).run(break_a_rule, rule))


def test_ranks_that_disagree_are_noticed():
    group = ((0, 1), 0)
    entry = partial(nccl_rules.Entry, group)
    sums, other = entry("allreduce", (4,)), entry("broadcast", (0, 4))
    assert difference([[sums, other], [sums, other]]) is None
    assert difference([[sums, other], [other, sums]]) is not None
    assert difference([[sums], [sums, other]]) is not None
    exchange = partial(entry, "all_to_all_single", (1,))
    first = exchange(sent=(1, 2), received=(1, 3))
    assert difference([[first], [exchange(sent=(3, 1), received=(2, 1))]]) is None
    assert difference([[first], [exchange(sent=(2, 1), received=(2, 1))]]) is not None


def collect_objects() -> bool:
    """Runs on every rank of a pool: whether a collective of objects is refused in a step."""
    with no_objects(), pytest.raises(AssertionError):
        dist.all_gather_object([None, None], 1)
    return True


def test_collectives_of_objects_are_noticed(rule_pools):
    assert rule_pools(2).run(collect_objects) == [True, True]
