"""Maps of the same rows take their gradients in common on a GPU; the gradients are the same."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moa_dist.kernels import shared_input
from moa_dist.models.objective import Batch, objective
from tests.models.small import PLACEMENTS, small_model, tokens_of

KINDS = [("dense", "dense gated"), ("moa", "moe gated"), ("switchhead", "moe")]
GPU = SimpleNamespace(of=lambda device: SimpleNamespace(device_type="cuda"))


def gradients(recompute: bool, **fields: object) -> dict[str, Tensor]:
    model = small_model(recompute=recompute, num_layers=4, **fields).train()
    objective(model, Batch(tokens_of())).loss(16.0).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_distinct", [2, 4], ids=["shared", "distinct"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_the_same_gradients(monkeypatch, attention, ffn, placement, num_distinct):
    fields = {"attention": attention, "ffn": ffn, "norm_placement": placement}
    fields |= {"num_distinct_layers": num_distinct}
    recompute = placement == "pre"
    apart = gradients(recompute, **fields)
    sizes = []
    add_weights = shared_input._add_weights

    def counted(joint: Tensor, x: Tensor, terms: list[shared_input.Term]) -> None:
        sizes.append(len(terms))
        add_weights(joint, x, terms)

    monkeypatch.setattr(shared_input, "Hardware", GPU)
    monkeypatch.setattr(shared_input, "_add_weights", counted)
    together = gradients(recompute, **fields)
    assert together.keys() == apart.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-10, atol=1e-13)
    # Queries, keys and values are as wide as the model here, each in a product of its own.
    assert max(sizes) == (2 if attention == "switchhead" else 1)
