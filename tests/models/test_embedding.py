"""The gradient of the embedding is summed over tokens and uses in fp32, and rounded once."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch, objective
from tests.models.small import VOCABULARY, small_config, tokens_of


@pytest.mark.parametrize(
    ("what", "tied", "mode"),
    [
        *product(["causal", "translation"], [True, False], ["plain"]),
        *product(["causal"], [True], ["recomputed", "compiled"]),
    ],
)
def test_the_gradient_of_the_table_is_rounded_once(what, tied, mode):
    config = small_config(tie_embeddings=tied, objective=what, position="sinusoidal")
    model = build_model(config, recompute=mode == "recomputed").bfloat16().train()
    if mode == "compiled":
        torch._dynamo.reset()
        model.compile_blocks(backend="aot_eager")
    exact = torch.zeros(VOCABULARY, config.d_model, dtype=torch.float64)

    def note(_: object, args: tuple[Tensor], output: Tensor) -> None:
        """Add what a use contributes, once its result's gradient is known."""
        (x,) = args

        def add(grad: Tensor) -> None:
            rows = grad.flatten(0, 1).double()
            if x.is_floating_point():
                exact.addmm_(rows.T, x.detach().flatten(0, 1).double())
            else:
                exact.index_add_(0, x.flatten(), rows)

        output.register_hook(add)

    model.embedding.register_forward_hook(note)
    tokens = tokens_of(8, 129) ** 3 // VOCABULARY**2  # few are frequent, as in language
    source = tokens_of(8, 65) if what == "translation" else None
    objective(model, Batch(tokens, source=source)).loss(1024.0).backward()
    grad = model.embedding.weight.grad
    assert grad is not None
    once = 2**-8 * exact.abs() + 1e-5 * exact.abs().max()
    assert ((grad.double() - exact).abs() <= once).all()
