"""Gradients of shared layers are summed over repeats in fp32, and rounded once."""

import pytest
import torch
from torch import Tensor

from moa_dist.config.model import Recompute
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.objective import Batch, objective
from tests.models.small import small_config, tokens_of

REPEATS = 16
KINDS = [
    ("switchhead", "moe", "peri"),
    ("moa", "moe gated", "pre"),
    ("dense", "dense gated", "post"),
]


RECOMPUTED: dict[str, Recompute] = {
    "recomputed": True,
    "attention again": ("attention", "experts"),
    "ffn again": ("ffn", "experts"),
}


def model_of(
    kinds: tuple[str, str, str], num_distinct: int, *, recompute: Recompute
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


@pytest.mark.parametrize(
    "mode", ["plain", *RECOMPUTED, pytest.param("compiled", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: kinds[0])
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
    if mode == "compiled":
        torch._dynamo.reset()
        shared.compile_blocks(backend="aot_eager")
    found, terms = gradients(shared), gradients(apart)
    errors = {}
    for name, gradient in found.items():
        if name.startswith("stack.layers.0."):
            rest = name.removeprefix("stack.layers.0.")
            of_repeats = torch.stack([terms[f"stack.layers.{i}.{rest}"] for i in range(REPEATS)])
            exact = of_repeats.sum(0)
            # What rounding comes to, of the sum and, since they are known no better, of its terms.
            once = 2**-9 * (exact.square().sum() + of_repeats.square().sum()).sqrt()
            errors[name] = float((gradient - exact).norm() / once)
    assert max(errors.values()) < 1.25
