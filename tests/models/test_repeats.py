"""Gradients of shared layers are summed over repeats in fp32, and rounded once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_dist.config.recompute import Recompute
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.objective import Batch, objective
from moa_dist.moe.borrowing import named_used_modules
from tests.models.small import FFN, router, small_config, tokens_of

REPEATS = 16
Section = str | dict[str, Any]
Kinds = tuple[Section, Section, str]
"""Attention, FFN and placement of norms."""
KINDS: dict[str, Kinds] = {
    "switchhead": ("switchhead", "moe", "peri"),
    "moa": ("moa", "moe gated", "pre"),
    "dense": ("dense", "dense gated", "post"),
    "composed": (
        {"kind": "composed", "num_heads": 2, "d_head": 4},
        FFN["moe"] | {"bias": True, "router": router(4, 2, kind="mlp", d_hidden=6)},
        "pre",
    ),
}


RECOMPUTED: dict[str, Recompute] = {
    "recomputed": True,
    "attention again": ("attention", "experts"),
    "ffn again": ("ffn", "experts"),
}


def model_of(
    kinds: tuple[Section, Section, str], num_distinct: int, *, recompute: Recompute
) -> LanguageModel:
    """Build a model of equal layers in bf16, all in one or each by itself."""
    attention, ffn, placement = kinds
    config = small_config(
        attention,
        ffn,
        norm_placement=placement,
        num_layers=REPEATS,
        num_distinct_layers=num_distinct,
    )
    return build_model(config, recompute=recompute).bfloat16().train()


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    objective(model, Batch(tokens_of(4, 17))).loss(64.0).backward()
    return {
        name: torch.zeros_like(p).double() if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


MODES = ["plain", *RECOMPUTED, pytest.param("compiled", marks=pytest.mark.full)]


def compile_with(model: LanguageModel, mode: str) -> None:
    if mode == "compiled":
        torch._dynamo.reset()
        model.compile_blocks(backend="aot_eager")


def error(gradient: Tensor, terms: list[Tensor]) -> float:
    """What rounding comes to, of the sum and, since they are known no better, of its terms."""
    of_repeats = torch.stack(terms)
    exact = of_repeats.sum(0)
    once = 2**-9 * (exact.square().sum() + of_repeats.square().sum()).sqrt()
    return float((gradient - exact).norm() / once)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_gradient_of_a_shared_layer_is_rounded_once(kinds, mode):
    shared = model_of(kinds, 1, recompute=RECOMPUTED.get(mode, False))
    apart = model_of(kinds, REPEATS, recompute=False)
    apart.load_state_dict(
        {
            name: shared.state_dict()[".".join(["stack.layers.0", *name.split(".")[3:]])]
            if name.startswith("stack.layers")
            else shared.state_dict()[name]
            for name in apart.state_dict()
        }
    )
    compile_with(shared, mode)
    found, terms = gradients(shared), gradients(apart)
    errors = {}
    for name, gradient in found.items():
        if name.startswith("stack.layers.0."):
            rest = name.removeprefix("stack.layers.0.")
            of_repeats = [terms[f"stack.layers.{i}.{rest}"] for i in range(REPEATS)]
            errors[name] = error(gradient, of_repeats)
    assert max(errors.values()) < 1.25


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sharing",
    [
        {"own": ["attention", "norms", "routers"]},
        {"own": ["norms"], "adapter_rank": 2, "vectors": True},
    ],
    ids=["tied experts", "adapters"],
)
def test_the_gradient_of_a_borrowed_part_is_rounded_once(sharing, mode):
    fields = {"num_layers": REPEATS + 2, "num_distinct_layers": 1, "prelude": 1, "coda": 1}
    config = small_config("switchhead", "moe", norm_placement="pre", **fields, sharing=sharing)
    shared = build_model(config, recompute=RECOMPUTED.get(mode, False)).bfloat16().train()
    apart = copy.deepcopy(shared)
    apart.stack.recompute = frozenset()
    for i, block in enumerate(apart.stack.blocks()):
        apart.stack.layers[i] = copy.deepcopy(block)  # with all that it borrows
    compile_with(shared, mode)
    gradients(shared), gradients(apart)
    terms: dict[Tensor, list[Tensor]] = {}
    for ours, theirs in zip(shared.stack.blocks(), apart.stack.blocks(), strict=True):
        for (_, module), (_, copied) in zip(*map(named_used_modules, (ours, theirs)), strict=True):
            for parameter, of_copy in zip(*map(own, (module, copied)), strict=True):
                assert of_copy.grad is not None
                terms.setdefault(parameter, []).append(of_copy.grad.double())
    errors = {}
    for name, parameter in shared.stack.named_parameters():
        assert parameter.grad is not None
        if len(terms[parameter]) > 1:
            errors[name] = error(parameter.grad.double(), terms[parameter])
    assert {len(of_repeats) for of_repeats in terms.values()} == {1, REPEATS}
    assert max(errors.values()) < 1.25


def own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
