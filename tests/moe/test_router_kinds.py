"""What holds for every kind of router."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moa_dist.config.routers import RouterConfig
from moa_dist.moe.initialize import initialize
from moa_dist.moe.router_kinds import make_router
from moa_dist.moe.token_state import RouterState
from moa_dist.profiling import PREFIX

SCORED = {"score": "softmax"}
FIELDS = {
    "topk": SCORED,
    "dense_training": SCORED,
    "gshard": {},
    "mlp": SCORED | {"d_hidden": 5},
    "recurrent": SCORED | {"d_state": 6},
    "relu": {},
    "task": {"tasks": 3},
    "threshold": {},
}
"""What a configuration must say of each kind besides the number of experts."""


@pytest.mark.parametrize("kind", FIELDS)
def test_a_trace_shows_all_of_its_work(kind):
    section = {"kind": kind, "num_experts": 4, "top_k": 2, **FIELDS[kind]}
    router = make_router(RouterConfig.model_validate(section), 8)
    initialize(router, seed=0)
    x, state = torch.zeros(2, 3, 8), RouterState(tasks=torch.tensor([0, 1]))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        router(x, state=state)
    outermost = {event.name for event in trace.events() if event.cpu_parent is None}
    assert outermost == {f"{PREFIX}router"}
