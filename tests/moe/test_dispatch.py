"""The local plan against one assignment at a time, in value and in gradient."""

from itertools import chain, product

import pytest
import torch

from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Normal, initialize
from tests.kernels.rows import assert_sorted_by_row
from tests.moe.routings import draw, random_routing

LEVELS = ["token", "group", "slot"]
T, G, E, K, D_IN, D_OUT = 7, 2, 5, 3, 4, 3


def row(level: str, t: int, g: int, k: int) -> int:
    return {"token": t, "group": t * G + g, "slot": (t * G + g) * K + k}[level]


def num_rows(level: str) -> int:
    return {"token": T, "group": T * G, "slot": T * G * K}[level]


def one_assignment_at_a_time(routing, weight, x, read, write, weighted):
    out = [torch.zeros(D_OUT, dtype=torch.float64) for _ in range(num_rows(write))]
    for t, g, k in product(range(T), range(G), range(K)):
        if routing.keep_mask is None or routing.keep_mask[t, g, k]:
            y = x[row(read, t, g, k)] @ weight[routing.topk_ids[t, g, k]]
            if weighted:
                y = y * routing.topk_weights[t, g, k]
            out[row(write, t, g, k)] = out[row(write, t, g, k)] + y
    return torch.stack(out)


@pytest.mark.parametrize("read", LEVELS)
@pytest.mark.parametrize("write", LEVELS)
@pytest.mark.parametrize("drop", [0, 0.4])
def test_routed_projection(read, write, drop):
    """All level pairs, those of sigma-MoE, MoA and SwitchHead among them."""
    routing = random_routing(T, G, E, K, drop=drop)
    experts = GroupedLinear(G * E, D_IN, D_OUT, Normal(1.0)).double()
    initialize(experts, seed=0)
    x = draw(num_rows(read), D_IN, seed=1).requires_grad_()
    plan = LocalTokenDispatcher().plan(routing, G * E)
    for weighted in (True, False):
        sent = plan.dispatch(x, read)
        ours = plan.run_and_combine(
            ExpertWeights(experts.weight), sent, read, write, weighted=weighted
        ).wait()
        theirs = one_assignment_at_a_time(routing, experts.weight, x, read, write, weighted)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        sources = (x, experts.weight, *([routing.topk_weights] if weighted else []))
        upstream = draw(num_rows(write), D_OUT, seed=2)
        gradients = (torch.autograd.grad(y, sources, upstream) for y in (ours, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drop", [0, 0.4])
def test_rows_are_listed_by_expert_and_by_row(drop):
    plan = LocalTokenDispatcher().plan(random_routing(T, G, E, K, drop=drop), G * E)
    for rows in plan.rows.values():
        assert_sorted_by_row(rows)


def test_rows_are_in_expert_major_order_and_tokens_stay_in_order():
    routing = random_routing(T, 1, E, K, drop=0.3)
    plan = LocalTokenDispatcher().plan(routing, E)
    tokens = plan.rows["token"].ids[: plan.counts.sum()].tolist()
    expected = [
        [t for t in range(T) if (routing.keep_mask & (routing.topk_ids == e))[t].any()]
        for e in range(E)
    ]
    assert plan.counts.tolist() == [len(takers) for takers in expected]
    assert tokens == list(chain(*expected))


@pytest.mark.parametrize("write", LEVELS)
def test_everything_dropped_gives_zeros_and_zero_gradients(write):
    routing = random_routing(T, G, E, K, drop=1.0)
    assert not routing.keep_mask.any()
    x = draw(T, D_IN).requires_grad_()
    plan = LocalTokenDispatcher().plan(routing, G * E)
    experts = ExpertWeights(draw(G * E, D_IN, D_OUT))
    y = plan.run_and_combine(
        experts, plan.dispatch(x, "token"), "token", write, weighted=True
    ).wait()
    assert y.shape == (num_rows(write), D_OUT)
    assert not y.any()
    for gradient in torch.autograd.grad(y.sum(), (x, routing.topk_weights)):
        assert not gradient.any()


def test_no_tokens():
    routing = random_routing(0, G, E, K)
    plan = LocalTokenDispatcher().plan(routing, G * E)
    assert plan.counts.tolist() == [0] * (G * E)
    experts = ExpertWeights(draw(G * E, D_IN, D_OUT))
    sent = plan.dispatch(draw(0, D_IN), "token")
    y = plan.run_and_combine(experts, sent, "token", "token", weighted=True).wait()
    assert y.shape == (0, D_OUT)


def test_bfloat16_rows_are_summed_in_fp32():
    """300 ones: a bfloat16 sum stops at 256."""
    routing = random_routing(1, 1, 300, 300)
    routing = routing._replace(topk_weights=torch.ones(1, 1, 300))
    plan = LocalTokenDispatcher().plan(routing, 300)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    experts = ExpertWeights(one.expand(300, 1, 1))
    y = plan.run_and_combine(
        experts, plan.dispatch(one, "token"), "token", "token", weighted=True
    ).wait()
    assert y.dtype == torch.bfloat16
    assert y.item() == 300
