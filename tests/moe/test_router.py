"""Which experts a router chooses, how it weighs them, and what it counts."""

import itertools

import pytest
import torch

from tests.moe.routings import draw, identity_router, random_router

GATES = ["raw", "renormalized", "renormalized_detached"]
SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}


def test_flat_ids_of_several_router_groups():
    """Group g has experts g * E ... g * E + E - 1, and chooses as a router of its own would."""
    E, K, G = 4, 2, 3
    x = draw(2, 5, 6)
    grouped = random_router(E, K, 6, G)
    routing = grouped(x)
    assert routing.topk_ids.shape == (10, G, K)
    assert routing.topk_ids.dtype == torch.int64
    assert grouped.num_experts == G * E
    for g in range(G):
        alone = random_router(E, K, 6)
        with torch.no_grad():
            alone.logits.weight.copy_(grouped.logits.weight[g * E : (g + 1) * E])
        expected = alone(x)
        assert torch.equal(routing.topk_ids[:, g], expected.topk_ids[:, 0] + g * E)
        torch.testing.assert_close(routing.topk_weights[:, g], expected.topk_weights[:, 0])
        assert torch.equal(routing.statistics.load[:, g], expected.statistics.load[:, 0])


def test_chooses_the_highest_logits():
    logits = torch.tensor([[[0.1, 3.0, 2.0, -1.0], [5.0, 4.0, -3.0, 4.5]]], dtype=torch.float64)
    assert identity_router(4, 2)(logits).topk_ids.tolist() == [[[1, 2]], [[0, 3]]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gate", GATES)
def test_weights_and_their_gradient(score, gate):
    """Each gate against its definition, the gradient to the logits included."""
    logits, upstream = draw(1, 6, 5).requires_grad_(), draw(6, 1, 3, seed=1)
    routing = identity_router(5, 3, score=score, gate=gate)(logits)
    gradient = torch.autograd.grad(routing.topk_weights, logits, upstream)[0]

    chosen = SCORES[score](logits)[0].gather(-1, routing.topk_ids[:, 0])
    total = chosen.sum(-1, keepdim=True)
    expected = chosen if gate == "raw" else chosen / total
    torch.testing.assert_close(routing.topk_weights[:, 0], expected)
    if gate == "renormalized_detached":  # the total counts as a constant: scale what flows back
        expected, upstream = chosen, upstream / total.detach()[:, None]
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, logits, upstream[:, 0])[0], rtol=1e-9, atol=1e-12
    )


def test_renormalized_softmax_is_the_softmax_over_chosen_logits():
    logits, upstream = draw(1, 6, 5).requires_grad_(), draw(6, 3, seed=1)
    routing = identity_router(5, 3, gate="renormalized")(logits)
    expected = logits[0].gather(-1, routing.topk_ids[:, 0]).softmax(-1)
    torch.testing.assert_close(routing.topk_weights[:, 0], expected)
    ours, theirs = (
        torch.autograd.grad(w, logits, upstream)[0] for w in (routing.topk_weights[:, 0], expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_scores_that_all_underflow_weigh_nothing(gate):
    """They are chosen when better experts are hidden; a sigmoid needs no more than that."""
    logits = torch.full((1, 6, 5), -120.0).requires_grad_()
    routing = identity_router(5, 3, score="sigmoid", gate=gate)(logits)
    assert routing.topk_weights.dtype == torch.float32
    assert (routing.topk_weights < 1e-6).all()
    routing.topk_weights.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gate", GATES)
def test_one_chosen_expert_trains_the_router_but_not_when_renormalized(score, gate):
    """With K = 1 a renormalized weight is the constant 1."""
    logits = draw(1, 6, 4).requires_grad_()
    weights = identity_router(4, 1, score=score, gate=gate)(logits).topk_weights
    gradient = torch.autograd.grad(weights.sum(), logits)[0]
    assert (gradient.abs().amax(-1) > 1e-3).all() == (gate != "renormalized")
    assert (gradient.abs().max() < 1e-12) == (gate == "renormalized")


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_input_is_routed_in_fp32(autocast):
    router, x = random_router(8, 3, 16).bfloat16(), draw(2, 9, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x)
    expected = router.float()(x.float())
    assert routing.topk_weights.dtype == torch.float32
    assert torch.equal(routing.topk_ids, expected.topk_ids)
    assert torch.equal(routing.topk_weights, expected.topk_weights)
    for ours, theirs in zip(
        routing.statistics.present(), expected.statistics.present(), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_logits_closer_than_bfloat16_do_not_tie_under_autocast():
    """In bfloat16 both would be 1, and the lower index would win."""
    logits = torch.tensor([[[1.0, 1.001]]])
    with torch.autocast("cpu", torch.bfloat16):
        routing = identity_router(2, 1).float()(logits)
    assert routing.topk_ids.item() == 1


MASK = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])


@pytest.mark.parametrize("capacity", [None, {"factor": 1.0}], ids=["dropless", "capacity"])
def test_padding_is_neither_routed_nor_counted(capacity):
    router, x = random_router(4, 2, 5, 2, capacity=capacity), draw(3, 6, 5)
    routing = router(x, MASK)
    assert not routing.keep_mask[~MASK.flatten()].any()
    if capacity is None:
        assert routing.keep_mask[MASK.flatten()].all()
    statistics = routing.statistics
    assert statistics.num_tokens.tolist() == [6, 2, 0]
    assert (statistics.load.sum(-1) == 2 * statistics.num_tokens[:, None]).all()
    for value in statistics.present():
        assert not value[2].any()

    other = router(torch.where(MASK[..., None], x, 100 * draw(3, 6, 5, seed=1)), MASK)
    assert torch.equal(other.keep_mask, routing.keep_mask)
    for ours, theirs in zip(other.statistics.present(), statistics.present(), strict=True):
        assert torch.equal(ours, theirs)


def test_padding_gets_no_gradient_from_the_statistics():
    x = draw(3, 6, 5).requires_grad_()
    statistics = random_router(4, 2, 5)(x, MASK).statistics
    (statistics.probability * draw(3, 1, 4, seed=1)).sum().add(statistics.z.sum()).backward()
    assert x.grad[MASK].any(-1).all()
    assert not x.grad[~MASK].any()


def test_statistics_equal_sums_over_tokens():
    B, S, E, K = 3, 6, 4, 2
    logits = draw(B, S, E)
    routing = identity_router(E, K, capacity={"factor": 0.5})(logits, MASK)
    ids, kept = (t.view(B, S, K) for t in (routing.topk_ids, routing.keep_mask))
    for b in range(B):
        real = [s for s in range(S) if MASK[b, s]]
        probability = [logits[b, s].softmax(-1) for s in real]
        load, dropped = torch.zeros(2, E, dtype=torch.int64)
        for s in real:
            for k in range(K):
                load[ids[b, s, k]] += 1
                dropped[ids[b, s, k]] += not kept[b, s, k]
        s = routing.statistics
        assert torch.equal(s.load[b, 0], load)
        assert torch.equal(s.dropped[b, 0], dropped)
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(s.probability[b, 0], sum(probability, torch.zeros(E).double()))
        entropies = sum((-(p * p.log()).sum() for p in probability), zero)
        torch.testing.assert_close(s.entropy[b, 0], entropies)
        z = sum((logits[b, t].exp().sum().log() ** 2 for t in real), zero)
        torch.testing.assert_close(s.z[b, 0], z)
    assert routing.statistics.dropped.sum() > 0


def test_load_is_counted_before_dropping_and_exactly():
    routing = random_router(4, 2, 5, 2, capacity={"factor": 0.5})(draw(3, 8, 5))
    statistics = routing.statistics
    assert statistics.load.dtype == statistics.dropped.dtype == torch.int64
    assert statistics.num_tokens.dtype == torch.int64
    assert (statistics.load.sum(-1) == 8 * 2).all()
    assert statistics.dropped.sum() == (~routing.keep_mask).sum() > 0
    kept = torch.bincount(routing.topk_ids[routing.keep_mask], minlength=8).view(2, 4)
    assert torch.equal((statistics.load - statistics.dropped).sum(0), kept)


def test_expert_dropout_hides_experts_in_training_only():
    x = draw(4, 64, 8)
    plain, router = random_router(8, 1, 8)(x), random_router(8, 1, 8, expert_dropout=0.5)
    assert torch.equal(router.eval()(x).topk_ids, plain.topk_ids)
    torch.manual_seed(0)
    routing = router.train()(x)
    # The best expert is hidden from half of the tokens.
    assert (routing.topk_ids != plain.topk_ids).double().mean().item() == pytest.approx(
        0.5, abs=0.1
    )
    # Dropout changes the choice; weights and probabilities stay those of all experts.
    scores = router.logits(x.flatten(0, 1)).softmax(-1)
    torch.testing.assert_close(
        routing.topk_weights[:, 0], scores.gather(-1, routing.topk_ids[:, 0])
    )
    assert torch.equal(routing.statistics.probability, plain.statistics.probability)


def test_group_sequences_are_counted_together():
    x = draw(4, 5, 6)
    one, two = (random_router(4, 2, 6, group_sequences=n)(x).statistics for n in (1, 2))
    for single, pair in zip(one.present(), two.present(), strict=True):
        torch.testing.assert_close(pair, single.unflatten(0, (2, 2)).sum(1))


@pytest.mark.parametrize("capacity", [None, {"factor": 1.0}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_group_sequences_that_do_not_divide_the_batch_raise(capacity, num_sequences):
    router = random_router(4, 2, 6, group_sequences=2, capacity=capacity)
    with pytest.raises(ValueError, match="group_sequences"):
        router(draw(num_sequences, 5, 6))


@pytest.mark.parametrize("bias", [0.0, 0.4])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_experts_come_from_the_best_groups(num_groups, bias):
    """Of three groups of three, the two whose best two experts have the highest sum."""
    limit = {"num_groups": 3, "top_groups": 2}
    more = {"score": "sigmoid", "group_limit": limit, "balance": {"bias_rate": 0.1}}
    router, x = random_router(9, 3, 6, num_groups, **more), draw(2, 7, 6)
    router.bias.value.copy_(torch.linspace(-bias, bias, 9).expand(num_groups, -1))
    routing = router(x)
    scores = router.logits(x.flatten(0, 1)).sigmoid().view(14, num_groups, 9).detach()
    others = 0
    for t, g in itertools.product(range(14), range(num_groups)):
        biased = (scores[t, g] + router.bias.value[g]).tolist()
        groups = sorted(range(3), key=lambda n: -sum(sorted(biased[3 * n : 3 * n + 3])[1:]))
        allowed = [e for e in range(9) if e // 3 in groups[:2]]
        best = sorted(allowed, key=lambda e: -biased[e])[:3]
        chosen = (routing.topk_ids[t, g] - 9 * g).tolist()
        assert chosen == best
        weights = scores[t, g, best]
        torch.testing.assert_close(routing.topk_weights[t, g], weights)
        others += set(best) != set(sorted(range(9), key=lambda e: -biased[e])[:3])
    assert others


def test_dropout_leaves_the_groups_alone():
    """An expert that dropout hides is chosen before one of another group."""
    limit = {"num_groups": 4, "top_groups": 1}
    router = random_router(8, 2, 6, group_limit=limit, expert_dropout=0.7).train()
    groups = router(draw(4, 50, 6)).topk_ids // 2
    assert torch.equal(groups[..., 0], groups[..., 1])


@pytest.mark.parametrize("gate", GATES)
def test_weights_are_scaled_after_the_gate(gate):
    logits = draw(1, 6, 5)
    plain, scaled = (
        identity_router(5, 3, gate=gate, route_scale=scale)(logits) for scale in (1.0, 2.5)
    )
    torch.testing.assert_close(scaled.topk_weights, 2.5 * plain.topk_weights)
    for ours, theirs in zip(scaled.statistics.present(), plain.statistics.present(), strict=True):
        assert torch.equal(ours, theirs)
