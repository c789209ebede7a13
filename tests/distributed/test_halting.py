"""Tokens halt at depths of their own, on every rank at others, and are reported as on one process.

`test_family.py` compares the steps.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import objective
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import AS_IF_LARGE, Case, micro_batches
from tests.distributed.test_family import FAMILY, POSITIONS


def sharpened(model: torch.nn.Module) -> None:
    """Let the gate decide by the token, which it does not at first."""
    with torch.no_grad():
        gate = model.stack.layers[0].halting.gate
        gate.out.weight.copy_(torch.linspace(-9, 9, gate.out.weight.numel()).view(2, -1).sin() * 4)


def on_rank(case: Case) -> tuple[float, list[int]]:
    """Take a step; returns what it reports, and how many tokens ran in each application."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    parallelize = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    model = build_model(config.model, parallelize=parallelize)
    sharpened(model)
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    batches = micro_batches(case, mesh)
    result = engine.step(batches, 0.0)
    ran = torch.zeros(config.model.num_layers, dtype=torch.int64)
    with torch.no_grad():
        for batch in batches:
            output = engine.model(*batch.inputs(), trace=True)
            ran += torch.stack([trace.running.sum() for trace in output.traces.values()])
    engine.close()
    return result.token_means["halting/applications"], ran.tolist()


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_depths_differ_between_ranks_and_are_reported(pools, exchange):
    case = replace(Case(exchange=exchange, micro_batch=2), model=POSITIONS | FAMILY["sut"])
    (reported, ran), (other_reported, other_ran) = pools(2).run(on_rank, case)
    assert reported == other_reported
    for of_rank in (ran, other_ran):
        assert of_rank[0] > of_rank[1] > of_rank[-1]
    assert ran != other_ran

    model = build_model(case.config().model).double()
    sharpened(model)
    batch = case.batch()
    taken, tokens = objective(model, batch).token_sums["halting/applications"].tolist()
    assert tokens == batch.num_read()
    assert taken == sum(ran) + sum(other_ran)
    assert reported == pytest.approx(taken / tokens)
