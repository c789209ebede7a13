"""Blocks compile as one graph, and never wait for the value of a tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moa_dist.models.block import Block
from moa_dist.models.language_model import build_model
from moa_dist.models.mask import AttentionMask
from moa_dist.models.objective import Batch, objective
from moa_dist.moe.initialize import initialize
from moa_dist.moe.losses import balance_losses
from tests.models.small import (
    ATTENTION,
    FFN,
    PLACEMENTS,
    VOCABULARY,
    router,
    small_config,
    small_model,
    tokens_of,
    with_capacity,
)

B, S, D = 2, 8, 16
BALANCE = {"switch": 0.1, "z_loss": 0.1, "entropy": 0.1, "mutual_information": 0.1}


def wide(section: dict[str, Any]) -> dict[str, Any]:
    """Widths that torch's grouped product takes, and all balance losses."""
    widths = {key: 8 for key in ("d_head", "d_expert") if key in section}
    if "router" in section:
        widths["router"] = section["router"] | {"balance": BALANCE}
    return section | widths


CASES = {
    f"{attention}, {ffn}, {placement}": {
        "attention": wide(ATTENTION[attention]),
        "ffn": wide(FFN[ffn]),
        "norm_placement": placement,
    }
    for attention, ffn, placement in [
        ("moa", "moe gated", PLACEMENTS[0]),
        ("moa", "dense", PLACEMENTS[1]),
        ("switchhead", "moe", PLACEMENTS[2]),
    ]
} | {
    f"capacity by {policy}": {k: wide(v) for k, v in with_capacity(policy).items()}
    for policy in ("probability", "position")
}
CASES["windows, soft caps"] = {
    "attention": wide(ATTENTION["switchhead"] | {"soft_cap": 2.0, "window": {"size": 3}}),
    "ffn": FFN["dense"],
}
CASES["shared experts, groups of experts"] = {
    "attention": wide(ATTENTION["moa"] | {"shared_experts": 1}),
    "ffn": wide(
        FFN["moe gated"]
        | {
            "shared_expert": {"d_expert": 8, "sigmoid_gate": True},
            "router": router(8, 2, route_scale=2.0, group_limit={"num_groups": 4, "top_groups": 2}),
        }
    ),
}


CASES["halting"] = {
    "attention": wide(ATTENTION["moa"]),
    "ffn": wide(FFN["moe gated"]),
    "halting": {"kind": "stick_breaking"},
}


def block_of(case: dict[str, Any]) -> Block:
    block = Block(small_config(**case, d_model=D))
    initialize(block, seed=0)
    return block


def loss_of(block: Block, x: Tensor, real: Tensor | None) -> Tensor:
    window = None if block.window is None else block.window.size
    mask = AttentionMask(True, real, real, window=window)
    output = block(x, mask)
    if block.halting is not None:
        output = block(output.x, mask, state=output.state)
    losses = [
        loss
        for name, router in block.routers().items()
        for loss in balance_losses(output.statistics[name], router.config.balance).values()
    ]
    return output.x.float().square().sum() + sum(losses)


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_graph_with_the_same_result(case, padding):
    block = block_of(case).double()
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.arange(S) < torch.tensor([[S], [S - 3]]) if padding else None
    expected = loss_of(block, x, real)
    sources = list(block.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(block, x, real)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(loss, sources, allow_unused=True) for loss in (compiled, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_value_is_looked_at(case, padding):
    """A tensor on the meta device has none: whatever made the host wait for a GPU raises here."""
    block = block_of(case).to("meta", torch.bfloat16)
    x = torch.empty(B, S, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    real = torch.empty(B, S, device="meta", dtype=torch.bool) if padding else None
    loss_of(block, x, real).backward()
    assert x.grad is not None


def test_looking_at_a_value_would_be_noticed():
    ids = torch.empty(4, device="meta", dtype=torch.int64)
    for look in (Tensor.tolist, Tensor.nonzero, Tensor.bincount, lambda t: bool(t.sum() > 1)):
        with pytest.raises(RuntimeError, match=r"[Mm]eta"):
            look(ids)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["switchhead", "moa"])
def test_one_compilation_serves_all_layers_and_loads(attention):
    """Twenty steps of inductor, with other loads in each: equal shapes are compiled once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = small_config(attention=attention, ffn="moe", num_layers=4, num_distinct_layers=2)
    plain, compiled = (build_model(config, seed=1).train() for _ in range(2))
    compiled.compile_blocks()
    loads = set()
    for step in range(20):
        tokens = torch.full((2, 17), step % VOCABULARY)
        tokens[:, ::2] = torch.randint(VOCABULARY, (2, 9), generator=seeded(step))
        ours, theirs = (objective(model, Batch(tokens)) for model in (compiled, plain))
        for result in (ours, theirs):
            result.loss(32.0).backward()
        torch.testing.assert_close(ours.cross_entropy, theirs.cross_entropy, rtol=1e-4, atol=1e-4)
        loads |= {str(s.load.tolist()) for s in theirs.statistics.values()}
        if step == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for name, parameter in plain.named_parameters():
                gradient = compiled.get_parameter(name).grad
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert len(loads) > 20
    assert graphs == 1  # distinct layers of equal shapes share it
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_evaluation_is_not_compiled():
    model = small_model(attention="moa")
    model.compile_blocks(backend=refuse)
    with torch.no_grad():
        model(tokens_of())
    model.eval()(tokens_of())
    with pytest.raises(Exception, match="compiled in vain"):
        model.train()(tokens_of())


def refuse(*_: Any) -> None:
    raise RuntimeError("compiled in vain")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
