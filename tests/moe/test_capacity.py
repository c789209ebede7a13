"""Which assignments an expert drops: counted per group of sequences, padding aside."""

import math

import pytest
import torch

from moa_dist.config.routers import CapacityConfig
from moa_dist.moe.capacity import expert_capacity, keep_within_capacity
from tests.moe.routings import draw, identity_router, random_router

POLICIES = ["probability", "position"]


@pytest.mark.parametrize(
    ("tokens", "factor", "top_k", "num_experts", "limit"),
    [
        (8, 1.0, 2, 4, 4),  # even
        (9, 1.0, 2, 4, 5),  # rounded up
        (8, 1.25, 1, 8, 2),
        (8, 0.01, 1, 8, 1),  # never below one where there are tokens
        (8, 100.0, 2, 4, 8),  # never above the tokens: a token takes an expert once
        (3, 1.0, 4, 4, 3),  # all experts chosen
        (0, 2.0, 2, 4, 0),
        (2**25 + 1, 1.0, 1, 1, 2**25 + 1),  # beyond fp32
        (100, 1.1, 1, 10, 11),  # which 1.1 * 100 / 10 exceeds in binary
    ],
)
def test_limit(tokens, factor, top_k, num_experts, limit):
    result = expert_capacity(torch.tensor([tokens]), factor, top_k, num_experts)
    assert result.tolist() == [limit]
    assert result.dtype == torch.int64


def keep(ids: list[int], scores: list[float], factor: float, policy: str) -> list[bool]:
    """One sequence, one router group, one choice of two experts per token."""
    kept = keep_within_capacity(
        torch.tensor(ids)[:, None, None],
        torch.tensor(scores)[:, None, None],
        None,
        top_k=1,
        num_experts=2,
        num_sequence_groups=1,
        capacity=CapacityConfig(factor=factor, policy=policy),
    )
    return kept.flatten().tolist()


def test_probability_keeps_the_highest_scores():
    scores = [0.1, 0.9, 0.5, 0.7, 0.6]
    assert keep([0, 0, 0, 0, 1], scores, 0.8, "probability") == [False, True, False, True, True]


def test_position_keeps_the_first():
    scores = [0.1, 0.9, 0.5, 0.7, 0.6]
    assert keep([0, 0, 0, 0, 1], scores, 0.8, "position") == [True, True, False, False, True]


def test_equal_scores_keep_the_first():
    """Else the kept tokens would depend on the sorting algorithm of the device."""
    assert keep([0] * 100, [0.5] * 100, 0.5, "probability") == [True] * 25 + [False] * 75


def by_hand(ids, scores, real, *, num_experts, num_sequence_groups, capacity):
    """One expert and one group of sequences at a time."""
    T, G, K = ids.shape
    size = T // num_sequence_groups
    kept = torch.zeros(T, G, K, dtype=torch.bool)
    for n in range(num_sequence_groups):
        tokens = [t for t in range(n * size, (n + 1) * size) if real is None or real[t]]
        limit = min(math.ceil(capacity.factor * K * len(tokens) / num_experts), len(tokens))
        for g in range(G):
            for e in range(num_experts):
                takers = [(t, k) for t in tokens for k in range(K) if ids[t, g, k] == e]
                if capacity.policy == "probability":
                    takers.sort(key=lambda taker: -scores[taker[0], g, taker[1]])
                for t, k in takers[:limit]:
                    kept[t, g, k] = True
    return kept


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.3])
def test_equals_one_expert_at_a_time(policy, padded, factor):
    T, G, K, E, N = 24, 2, 3, 5, 3
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(T, G, E, generator=generator) ** torch.arange(1, E + 1)).topk(K).indices
    scores = torch.rand(T, G, K, generator=generator)
    real = torch.rand(T, generator=generator) < 0.7 if padded else None
    arguments = {
        "num_experts": E,
        "num_sequence_groups": N,
        "capacity": CapacityConfig(factor=factor, policy=policy),
    }
    kept = keep_within_capacity(ids, scores, real, top_k=K, **arguments)
    expected = by_hand(ids, scores, real, **arguments)
    assert torch.equal(kept, expected)
    lost = ~kept if real is None else ~kept[real]
    assert lost.any(), "nothing dropped: the test proves nothing"


@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_are_independent(policy):
    """What one sequence drops does not depend on the others of its batch."""
    router = random_router(4, 2, 6, 2, capacity={"factor": 0.7, "policy": policy})
    x = draw(3, 10, 6)
    mask = torch.arange(10) < torch.tensor([10, 4, 7])[:, None]
    whole = router(x, mask).keep_mask.unflatten(0, (3, 10))
    for b in range(3):
        assert torch.equal(router(x[b : b + 1], mask[b : b + 1]).keep_mask, whole[b])


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_uses_no_capacity(policy):
    """Padding in front, with the highest scores, changes nothing for real tokens."""
    router = random_router(4, 2, 6, capacity={"factor": 0.7, "policy": policy})
    x = draw(1, 10, 6)
    padded = torch.cat([100 * draw(1, 7, 6, seed=1), x], 1)
    mask = (torch.arange(17) >= 7)[None]
    kept = router(padded, mask).keep_mask
    assert not kept[:7].any()
    assert torch.equal(kept[7:], router(x).keep_mask)
    assert not router(x).keep_mask.all()


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_of_sequences_share_capacity(policy):
    """With two sequences per group, only their joint load counts."""
    logits = torch.full((2, 4, 2), 0.0, dtype=torch.float64)
    logits[0, :, 0] = logits[1, :, 1] = 1.0  # each sequence takes an expert of its own
    apart, together = (
        identity_router(2, 1, capacity={"factor": 1.0, "policy": policy}, group_sequences=n)(logits)
        for n in (1, 2)
    )
    assert apart.keep_mask.sum() == 4
    assert together.keep_mask.all()
