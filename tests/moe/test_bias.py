"""The selection bias: where it moves, and that it chooses experts without weighing them."""

import pytest
import torch

from moa_dist.moe.bias import SelectionBias
from moa_dist.moe.initialize import initialize
from tests.moe.routings import draw, identity_router, random_router

RATE = 0.25


def test_moves_up_below_the_mean_load_and_down_above():
    bias = SelectionBias(2, 4, RATE)
    initialize(bias, seed=0)
    assert not bias.value.any()
    bias.update(torch.tensor([[2, 0, 4, 2], [9, 9, 9, 9]]))
    assert bias.value.tolist() == [[0.0, RATE, -RATE, 0.0], [0.0] * 4]
    bias.update(torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]]))  # each router group for itself
    assert bias.value.tolist() == [[RATE, 2 * RATE, -2 * RATE, RATE], [0.0] * 4]


def test_loads_that_floats_cannot_tell_apart():
    bias = SelectionBias(1, 2, RATE)
    initialize(bias, seed=0)
    bias.update(torch.tensor([[2**53, 2**53 + 2]]))
    assert bias.value.tolist() == [[RATE, -RATE]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate", ["raw", "renormalized"])
def test_changes_the_choice_but_neither_weights_nor_probabilities(score, gate):
    router = identity_router(4, 2, score=score, gate=gate, balance={"bias_rate": RATE})
    logits = draw(1, 32, 4)
    before = router(logits)
    router.bias.value[0, 3] = 10.0
    after = router(logits)
    assert (after.topk_ids == 3).any(-1).all()
    assert not (before.topk_ids == 3).any(-1).all()
    scores = logits[0].softmax(-1) if score == "softmax" else logits[0].sigmoid()
    chosen = scores.gather(-1, after.topk_ids[:, 0])
    expected = chosen if gate == "raw" else chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(after.topk_weights[:, 0], expected)
    assert torch.equal(after.statistics.probability, before.statistics.probability)
    assert not torch.equal(after.statistics.load, before.statistics.load)


def test_full_experts_drop_by_score_not_by_bias():
    """An assignment's bias is the same for all tokens that compete for an expert."""
    capacity = {"factor": 1.0, "policy": "probability"}
    router = identity_router(2, 1, capacity=capacity, balance={"bias_rate": RATE})
    router.bias.value[0, 1] = 10.0
    routing = router(torch.tensor([[[0.0, 1.0], [0.0, 3.0]]], dtype=torch.float64))
    assert routing.topk_ids.flatten().tolist() == [1, 1]
    assert routing.keep_mask.flatten().tolist() == [False, True]


def test_hidden_experts_stay_hidden():
    router = random_router(8, 1, 8, expert_dropout=0.5, balance={"bias_rate": RATE}).train()
    router.bias.value[0, 3] = 100.0
    chosen = (router(draw(4, 64, 8)).topk_ids == 3).double().mean().item()
    assert chosen == pytest.approx(0.5, abs=0.1)


def test_balances_a_collapsed_router():
    """All tokens prefer two experts; after some steps the load is nearly even."""
    router = identity_router(8, 2, score="sigmoid", balance={"bias_rate": 0.02})
    preferred = torch.tensor([2.0, 1.5] + [0.0] * 6, dtype=torch.float64)
    for step in range(200):
        load = router(draw(8, 32, 8, seed=step) + preferred).statistics.load.sum(0)
        if step == 0:
            assert load.max() > 2 * load.double().mean()
        router.bias.update(load)
    assert load.max() < 1.25 * load.double().mean()


def test_no_rate_no_bias():
    assert random_router(4, 2, 8).bias is None
