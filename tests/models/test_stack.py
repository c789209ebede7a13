"""Stacks: shared layers are the same function as copies, recomputation changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moa_dist.models.calls import RouterCall
from moa_dist.models.stack import LayerStack
from moa_dist.moe.losses import BALANCE_LOSSES
from moa_dist.moe.statistics import total
from tests.models.small import ATTENTION, FFN, small_config, small_model, tokens_of

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("attention", ATTENTION)
def test_shared_layers_equal_hand_copied_ones(attention):
    """G = 2, R = 2 is the function of layers A, B, A, B; its gradient sums over the copies."""
    fields = {"attention": attention, "num_layers": 4, "norm_placement": "peri"}
    shared, copied = small_model(**fields, num_distinct_layers=2), small_model(**fields)
    weights = shared.state_dict()

    def shared_name(name: str, i: int) -> str:
        return name.replace(f"layers.{i}.", f"layers.{i % 2}.")

    copied.load_state_dict(
        {n: weights[shared_name(shared_name(n, 2), 3)] for n in copied.state_dict()}
    )
    tokens = tokens_of()
    ours, theirs = shared(tokens), copied(tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    for (layer, repeat, router), statistics in ours.statistics.items():
        expected = theirs.statistics[RouterCall(2 * repeat + layer, 0, router)]
        torch.testing.assert_close(statistics.probability, expected.probability, **CLOSE)

    for output in (ours, theirs):
        F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()).backward()
    copies = dict(copied.named_parameters())
    for name, parameter in shared.named_parameters():
        gradient = copies[name].grad
        for i in (0, 1):
            if f"layers.{i}." in name:
                gradient = gradient + copies[name.replace(f"layers.{i}.", f"layers.{i + 2}.")].grad
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


def test_number_of_repeats_must_be_whole():
    with pytest.raises(ValueError, match="3 distinct layers do not divide 4 layers"):
        LayerStack(small_config(num_layers=4, num_distinct_layers=3))


def test_statistics_of_every_application():
    model = small_model(attention="switchhead", num_layers=6, num_distinct_layers=2)
    routers = ("attention.value", "attention.output", "ffn")
    expected = {
        RouterCall(layer, repeat, r) for layer in (0, 1) for repeat in (0, 1, 2) for r in routers
    }
    assert model(tokens_of()).statistics.keys() == expected


def test_auxiliary_losses_are_taken_over_the_sum_of_repeats_and_added_over_layers():
    """And over the two routers of SwitchHead (MoEUT section 2.2)."""
    balance = {"entropy": 0.5, "switch": 2.0}
    model = small_model(
        attention=ATTENTION["switchhead"]
        | {"router": ATTENTION["switchhead"]["router"] | {"balance": {"entropy": 3.0}}},
        ffn=FFN["moe"] | {"router": FFN["moe"]["router"] | {"balance": balance}},
        num_layers=6,
        num_distinct_layers=2,
    )
    output = model(tokens_of())

    def loss(name: str, router: str) -> torch.Tensor:
        by_layer = [
            total(output.statistics[RouterCall(layer, repeat, router)] for repeat in range(3))
            for layer in range(2)
        ]
        return sum(BALANCE_LOSSES[name](statistics) for statistics in by_layer)

    expected = {
        "attention/entropy": 3.0
        * (loss("entropy", "attention.value") + loss("entropy", "attention.output")),
        "ffn/entropy": 0.5 * loss("entropy", "ffn"),
        "ffn/switch": 2.0 * loss("switch", "ffn"),
    }
    torch.testing.assert_close(output.aux_losses, expected)


RECOMPUTE = [True, ("attention",), ("ffn",), ("experts",), ("attention", "ffn", "experts")]


def losses_and_gradients(model, tokens):
    torch.manual_seed(0)
    output = model.train()(tokens)
    aux_losses = sum(output.aux_losses.values())
    loss = F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()) + aux_losses
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), dict(zip(names, gradients, strict=True)), output.statistics


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("expert_dropout", "recompute"), [(0.3, True), *((0.0, what) for what in RECOMPUTE)], ids=str
)
def test_recomputation_is_bit_identical(attention, expert_dropout, recompute):
    """Loss, statistics and every gradient; nothing is counted twice."""
    routers = {"expert_dropout": expert_dropout, "balance": {"entropy": 0.1, "z_loss": 0.1}}
    section = ATTENTION[attention]
    if "router" in section:
        section = section | {"router": section["router"] | routers}
    fields = {
        "attention": section,
        "ffn": FFN["moe"] | {"router": FFN["moe"]["router"] | routers},
        "num_layers": 4,
        "num_distinct_layers": 2,
    }
    plain, recomputed = (
        losses_and_gradients(small_model(**fields, recompute=r), tokens_of())
        for r in (False, recompute)
    )
    assert torch.equal(plain[0], recomputed[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
    for call, statistics in plain[2].items():
        for ours, theirs in zip(statistics.present(), recomputed[2][call].present(), strict=True):
            assert torch.equal(ours, theirs), call


class Operators(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [True, ("attention", "ffn")], ids=str)
@pytest.mark.parametrize("attention", ["moa", "switchhead"])
def test_recomputation_does_not_choose_experts_again(attention, recompute):
    """A choice that rounds differently the second time would give wrong gradients."""
    model = small_model(attention=attention, recompute=recompute)
    choose, score = torch.ops.aten.topk.default, torch.ops.aten.sigmoid.default
    with Operators() as forward:
        loss = model(tokens_of()).logits.square().sum()
    with Operators() as backward:
        loss.backward()
    assert choose in forward.called
    assert choose not in backward.called
    assert score in backward.called, "nothing was recomputed: the test proves nothing"


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=str)
def test_a_recomputed_graph_can_be_gone_through_twice(recompute):
    """As gradients of one loss after the other do."""
    first, both = (small_model(attention="moa", recompute=recompute) for _ in range(2))
    for model, times in ((first, 1), (both, 2)):
        loss = model(tokens_of()).logits.square().sum()
        for _ in range(times):
            loss.backward(retain_graph=True)
    for ours, theirs in zip(first.parameters(), both.parameters(), strict=True):
        assert torch.equal(2 * ours.grad, theirs.grad)


@pytest.mark.parametrize("attention", ATTENTION)
def test_autocast(attention):
    """Of those who use the model in a training of theirs."""
    model = small_model(attention=attention).float()
    plain = model(tokens_of()).logits
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(tokens_of()).logits
    narrow.float().square().sum().backward()
    torch.testing.assert_close(narrow.float(), plain, atol=0.05, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_recomputation_is_off_without_gradients():
    model = small_model(recompute=True)
    with torch.no_grad():
        logits = model(tokens_of()).logits
    assert torch.equal(logits, model(tokens_of()).logits)
    assert not logits.requires_grad
