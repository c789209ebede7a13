"""Balance losses: their known values, and that splits of a batch and repeats add up."""

import math

import pytest
import torch

from moa_dist.config.routers import BalanceConfig
from moa_dist.moe.losses import (
    BALANCE_LOSSES,
    balance_losses,
    entropy_loss,
    mutual_information_loss,
    switch_loss,
    z_loss,
)
from moa_dist.moe.statistics import report, total
from tests.moe.routings import draw, random_router, statistics_of

E = 4


def preferring(*experts: int, by: float = 1.0) -> torch.Tensor:
    """Logits [1, S, E]: token s prefers `experts[s]`."""
    return by * torch.eye(E, dtype=torch.float64)[list(experts)][None]


def test_switch_loss_is_one_when_even_and_the_number_of_experts_when_collapsed():
    even, collapsed = preferring(0, 1, 2, 3), preferring(2, 2, 2, by=100.0)
    assert switch_loss(statistics_of(even)).item() == pytest.approx(1.0)
    assert switch_loss(statistics_of(collapsed)).item() == pytest.approx(E)


def test_switch_loss_counts_assignments_not_tokens():
    """With K choices per token the shares still sum to one."""
    even = preferring(0, 1, 2, 3) + preferring(1, 2, 3, 0)
    assert switch_loss(statistics_of(even, top_k=2)).item() == pytest.approx(1.0)


def test_switch_loss_sees_the_load_before_dropping():
    """Else dropping would hide the imbalance that it comes from."""
    logits = draw(2, 12, E)
    dropping = statistics_of(logits, capacity={"factor": 0.5})
    assert dropping.dropped.any()
    assert torch.equal(switch_loss(dropping), switch_loss(statistics_of(logits)))


def test_entropy_loss_of_even_and_of_collapsed_probability():
    uniform = torch.zeros(1, 5, E, dtype=torch.float64)
    assert entropy_loss(statistics_of(uniform)).item() == pytest.approx(-math.log(E))
    # Each token is sure of its expert, all together use them evenly.
    assert entropy_loss(statistics_of(preferring(0, 1, 2, 3, by=50.0))).item() == pytest.approx(
        -math.log(E)
    )
    assert entropy_loss(statistics_of(preferring(1, 1, 1, by=50.0))).item() == pytest.approx(0)


def test_z_loss_is_the_mean_squared_logsumexp():
    logits = draw(3, 5, E)
    expected = logits.exp().sum(-1).log().square().mean().item()
    assert z_loss(statistics_of(logits)).item() == pytest.approx(expected)


def test_mutual_information_by_hand():
    """H(e|x) - H(e): what is gained where tokens are sure and their average is even."""
    half, quarter = math.log(0.5), math.log(0.25)
    logits = torch.tensor([[[half, half], [quarter, math.log(0.75)]]], dtype=torch.float64)
    mean = [0.375, 0.625]
    conditional = (math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 2
    marginal = -sum(p * math.log(p) for p in mean)
    loss = mutual_information_loss(statistics_of(logits)).item()
    assert loss == pytest.approx(conditional - marginal)
    assert loss < 0


def test_mutual_information_is_lowest_for_decided_tokens_and_an_even_average():
    def loss(logits):
        return mutual_information_loss(statistics_of(logits)).item()

    assert loss(preferring(0, 1, 2, 3, by=50.0)) == pytest.approx(-math.log(E))
    assert loss(preferring(1, 1, 1, by=50.0)) == pytest.approx(0)  # decided, but not even
    assert loss(torch.zeros(1, 5, E).double()) == pytest.approx(0)  # even, but undecided
    logits = preferring(0, 1, 2, 3).requires_grad_()
    step = torch.autograd.grad(mutual_information_loss(statistics_of(logits)), logits)[0]
    assert loss((logits - step).detach()) < loss(logits.detach())
    assert (step.diagonal(dim1=1, dim2=2) < 0).all()  # descending, each token grows more decided


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("group_sequences", [1, 2])
def test_gradients_are_those_of_finite_differences(name, group_sequences):
    def loss(logits):
        statistics = statistics_of(logits, MASK[:4], group_sequences=group_sequences)
        return BALANCE_LOSSES[name](statistics)

    assert torch.autograd.gradcheck(loss, draw(4, 6, E).requires_grad_())


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_one_group_is_the_loss_of_all_tokens(name):
    """As if one long sequence held them."""
    logits = draw(3, 6, E)
    together = statistics_of(logits, MASK[:3]).as_one_group()
    concatenated = statistics_of(logits.reshape(1, -1, E), MASK[:3].reshape(1, -1))
    for ours, theirs in zip(together, concatenated, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(BALANCE_LOSSES[name](together), BALANCE_LOSSES[name](concatenated))


MASK = torch.arange(6) < torch.tensor([6, 3, 1, 5, 4, 2])[:, None]


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_micro_batches_average_to_the_whole_batch(name, num_groups):
    """Loss and gradient, with uneven padding: the layout must not change the objective."""
    router, x = random_router(E, 2, 5, num_groups), draw(6, 6, 5)

    def loss_and_gradient(*batches):
        losses = [BALANCE_LOSSES[name](router(x[b], MASK[b]).statistics) for b in batches]
        loss = sum(losses) / len(losses)
        return loss, torch.autograd.grad(loss, router.logits.weight)[0]

    sequences = torch.arange(6)
    whole = loss_and_gradient(sequences)
    for size in (1, 2, 3):
        split = loss_and_gradient(*sequences.split(size))
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)


def test_repeats_of_a_shared_layer_may_specialize():
    """Entropy of the mean over repeats (MoEUT section 2.2), not the mean of their entropies."""
    first, second = (statistics_of(preferring(e, e, by=50.0)) for e in (0, 1))
    assert entropy_loss(total([first, second])).item() == pytest.approx(-math.log(2))
    assert entropy_loss(first).item() == entropy_loss(second).item() == pytest.approx(0)


def test_router_groups_are_averaged():
    """Each head has a loss of its own: one collapsed head is not hidden by the other."""
    both = torch.cat([preferring(0, 1, 2, 3), preferring(2, 2, 2, 2, by=100.0)], -1)
    router = random_router(E, 1, 2 * E, 2)
    with torch.no_grad():
        router.logits.weight.copy_(torch.eye(2 * E))
    assert switch_loss(router(both).statistics).item() == pytest.approx((1 + E) / 2)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_sequence_of_padding_contributes_zero(name):
    """To the loss, and no NaN to the gradient."""
    logits = draw(2, 5, E).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    loss = BALANCE_LOSSES[name](statistics_of(logits, mask))
    alone = BALANCE_LOSSES[name](statistics_of(logits[:1]))
    torch.testing.assert_close(loss, alone / 2)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, alone / 2))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_probability_that_underflows_gives_a_finite_gradient(name):
    """fp32 softmax is exactly zero some 104 below the maximum."""
    logits = torch.tensor([[[150.0, 0.0, 1.0], [151.0, 0.0, 2.0]]], requires_grad=True)
    statistics_fp32 = random_router(3, 1, 3).float()
    with torch.no_grad():
        statistics_fp32.logits.weight.copy_(torch.eye(3))
    loss = BALANCE_LOSSES[name](statistics_fp32(logits).statistics)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_only_losses_with_a_coefficient_are_returned():
    statistics = statistics_of(draw(2, 5, E))
    losses = balance_losses(statistics, BalanceConfig(entropy=0.5, z_loss=2.0))
    assert losses.keys() == {"entropy", "z_loss"}
    torch.testing.assert_close(losses["entropy"], 0.5 * entropy_loss(statistics))
    torch.testing.assert_close(losses["z_loss"], 2.0 * z_loss(statistics))


def test_report_adds_up_over_sequences_without_gradient():
    logits = draw(3, 6, E).requires_grad_()
    statistics = statistics_of(logits, MASK[:3], top_k=2, capacity={"factor": 0.5})
    summary = report(statistics)
    assert torch.equal(summary.load, statistics.load.sum(0))
    assert torch.equal(summary.dropped, statistics.dropped.sum(0))
    entropy = torch.distributions.Categorical(logits=logits).entropy()[MASK[:3]]
    assert summary.entropy.tolist() == pytest.approx([entropy.sum().item(), len(entropy)])
    assert not any(value.requires_grad for value in summary)
