"""Initial weights depend on seed, name and global expert index: never on the layout."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from moa_dist.config.model import ModelConfig
from moa_dist.models.language_model import build_model
from moa_dist.moe.experts import GroupedLinear, expert_layers, shard_starts
from moa_dist.moe.initialize import Constant, Normal, XavierUniform, initialize

ROUTER = {"num_experts": 5, "top_k": 2, "score": "sigmoid"}
CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 13,
        "d_model": 8,
        "num_layers": 2,
        "norm_placement": "peri",
        "attention": {"kind": "switchhead", "num_heads": 2, "d_head": 4, "router": ROUTER},
        "ffn": {"kind": "moe", "d_expert": 4, "gated": True, "router": ROUTER},
    }
)


def weights(seed: int = 0, **more) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in build_model(CONFIG, seed=seed, **more).named_parameters()}


def keep_shard(model: nn.Module, rank: int, num_ranks: int) -> None:
    for _, layer in expert_layers(model):
        layer.shard(rank, num_ranks)


def test_seed_decides():
    same, again, other = weights(3), weights(3), weights(4)
    for name, value in same.items():
        assert torch.equal(value, again[name])
        constant = "norm" in name or name.endswith("bias")
        assert torch.equal(value, other[name]) == constant, name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_sharding_does_not_change_weights(num_ranks):
    """Bit for bit, also where shards differ in size (10 and 5 experts)."""
    whole, experts = weights(), {f"{n}.weight" for n, _ in expert_layers(build_model(CONFIG))}
    shards = [
        weights(parallelize=lambda model, rank=rank: keep_shard(model, rank, num_ranks))
        for rank in range(num_ranks)
    ]
    for name, value in whole.items():
        pieces = [shard[name] for shard in shards]
        if name in experts:
            sizes = [b - a for a, b in pairwise(shard_starts(len(value), num_ranks))]
            assert len({piece.shape for piece in pieces}) == 1
            assert not any(p[n:].any() for p, n in zip(pieces, sizes, strict=True)), "padding"
            kept = [piece[:n] for piece, n in zip(pieces, sizes, strict=True)]
            assert torch.equal(torch.cat(kept), value), name
        else:
            assert all(torch.equal(piece, value) for piece in pieces), name
    assert len(experts) == 2 * 5


def test_sharding_after_allocation_keeps_the_same_experts():
    whole, model = weights(), build_model(CONFIG)
    keep_shard(model, 1, 3)
    for name, layer in expert_layers(model):
        stop = layer.first_expert + layer.num_local
        expected = whole[f"{name}.weight"][layer.first_expert : stop]
        assert torch.equal(layer.weight[: layer.num_local], expected)
        assert isinstance(layer.weight, nn.Parameter)


def test_no_two_tensors_or_experts_start_equal():
    model = build_model(CONFIG)
    experts = [expert for _, layer in expert_layers(model) for expert in layer.weight]
    firsts = torch.stack([expert.flatten()[:4] for expert in experts])
    assert len(firsts.unique(dim=0)) == len(firsts)
    by_name = dict(model.named_parameters())
    names = [n for n in by_name if n.startswith("stack.layers.0.") and "norm" not in n]
    for name in names:
        assert not torch.equal(by_name[name], by_name[name.replace("layers.0", "layers.1")]), name


def test_every_parameter_is_filled():
    """Of all module kinds: memory that `to_empty` left is never a weight."""
    model = build_model(CONFIG)
    expected = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed=0)
    for (name, parameter), value in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(parameter, value), name


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_normal_has_the_asked_std():
    values = Normal(0.3).draw(torch.Size([200, 100]), generator())
    assert values.std().item() == pytest.approx(0.3, rel=0.02)
    assert values.mean().item() == pytest.approx(0, abs=0.01)


def test_equal_rows_have_one_length_and_the_asked_std():
    values = Normal(0.3, equal_rows=True).draw(torch.Size([200, 100]), generator())
    torch.testing.assert_close(values.norm(dim=-1), torch.full((200,), 0.3 * math.sqrt(100)))
    assert values.square().mean().sqrt().item() == pytest.approx(0.3)


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_xavier_bound(gain):
    values = XavierUniform(gain).draw(torch.Size([60, 40]), generator())
    bound = gain * math.sqrt(6 / 100)
    assert 0.99 * bound < values.max() <= bound
    assert -bound <= values.min() < -0.99 * bound


def test_constant():
    assert Constant(2.0).draw(torch.Size([2, 3]), generator()).tolist() == [[2.0] * 3] * 2


def test_expert_std_is_that_of_one_expert():
    """Fan-in and fan-out of an expert, whatever their number."""
    layer = GroupedLinear(50, 20, 30, XavierUniform())
    initialize(layer, seed=0)
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 50), rel=0.01)
