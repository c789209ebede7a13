"""Relatives compute what their authors' code computes: outputs, losses, gradients, in fp64.

tests/golden/relatives/ holds inputs, parameters, outputs and gradients printed by running it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moa_dist.config.family import MLPRouterConfig, ReLURouterConfig
from moa_dist.config.model import BalanceConfig, MoAConfig, MoEFFNConfig
from moa_dist.models.attention import AttentionMask
from moa_dist.models.feed_forward import MoEFeedForward
from moa_dist.models.moa import MoAAttention
from moa_dist.moe.adapt import StepLoad, adapt

GOLDEN = Path(__file__).parent.parent / "golden" / "relatives"
BOUND = 1e-9


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= BOUND * theirs.norm()


REMOE = {
    "router": "router.logits.weight",
    "w_gate": "up.weight",
    "w_up": "gate.weight",
    "w_down": "down.weight",
}


def remoe(d_expert: int) -> MoEFeedForward:
    router = ReLURouterConfig(
        num_experts=8,
        top_k=2,
        group_sequences=2,
        balance=BalanceConfig(scope="micro_batch"),
    )
    config = MoEFFNConfig(d_expert=d_expert, router=router, gated=True, activation="silu")
    layer = MoEFeedForward(config, 24, 1.0).double()
    layer.router.sparsity.value.fill_(0.05)
    return layer


def of_remoe(golden: dict[str, Tensor], prefix: str, name: str) -> Tensor:
    value = golden[f"{prefix}.{name}"]
    return value if name.endswith("router") else value.transpose(-1, -2)


def test_remoe():
    golden = load_file(GOLDEN / "remoe_layer.safetensors")
    layer = remoe(16)
    layer.load_state_dict({REMOE[n]: of_remoe(golden, "param", n) for n in REMOE}, strict=False)
    x = golden["x"].transpose(0, 1).requires_grad_()
    output = layer(x, x, None)
    loss = layer.router.losses(output.statistics[""])["sparsity"]
    ((output.y * golden["grad_y"].transpose(0, 1)).sum() + loss).backward()
    close(output.y, golden["y"].transpose(0, 1))
    close(loss, golden["l1_reg"])
    assert (output.y == 0).all(-1).any()  # a token without experts
    close(x.grad, golden["grad.x"].transpose(0, 1))
    for name in REMOE:
        close(layer.get_parameter(REMOE[name]).grad, of_remoe(golden, "grad", name))


def test_remoe_holds_its_sparsity():
    """Fourteen steps of SGD on two layers, after each of which the coefficient adapts."""
    golden = load_file(GOLDEN / "remoe_schedule.safetensors")
    layers = nn.ModuleList([remoe(12), remoe(12)])
    for i, layer in enumerate(layers):
        state = {REMOE[n]: of_remoe(golden, f"param.{i}", n) for n in REMOE}
        layer.load_state_dict(state, strict=False)
    routers = {i: layer.router for i, layer in enumerate(layers)}
    for step, x in enumerate(golden["x"].transpose(1, 2)):
        h, loss, loads = x, torch.zeros(()), {}
        for i, layer in enumerate(layers):
            output = layer(h, h, None)
            h = h + output.y
            statistics = output.statistics[""]
            loss = loss + layer.router.losses(statistics)["sparsity"]
            loads[i] = StepLoad(statistics.load.sum(0), statistics.num_tokens.sum())
        close(routers[0].sparsity.value, golden["coefficient_used"][step])
        close(h, golden["y"][step].transpose(0, 1))
        layers.zero_grad()
        ((h * golden["grad_y"][step].transpose(0, 1)).sum() + loss).backward()
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter -= 0.01 * parameter.grad
        adapt(routers, loads)
        close(routers[1].sparsity.value, golden["coefficient_after"][step])
    for i, layer in enumerate(layers):
        for name in REMOE:
            close(layer.get_parameter(REMOE[name]), of_remoe(golden, f"final.{i}", name))


MODULEFORMER = {
    "gate_in": "router.logits.hidden.weight",
    "gate_in_bias": "router.logits.bias",
    "gate_out": "router.logits.out.weight",
    "w_q": "q.weight",
    "w_o": "o.weight",
    "w_k": "k.weight",
    "b_k": "k.bias",
    "w_v": "v.weight",
    "b_v": "v.bias",
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_moduleformer(padded):
    golden = load_file(GOLDEN / f"moduleformer_causal{'_padded' if padded else ''}.safetensors")
    x = golden["x"].requires_grad_()
    router = MLPRouterConfig(
        num_experts=7,
        top_k=2,
        d_hidden=20,
        score="softmax",
        group_sequences=len(x),
        balance=BalanceConfig(mutual_information=3.0),
    )
    config = MoAConfig(
        d_head=6,
        heads_per_expert=2,
        rope=None,
        attend="stick_breaking",
        kv_bias=True,
        router=router,
    )
    layer = MoAAttention(config, 32, 1.0).double()
    layer.load_state_dict({ours: golden[f"param.{n}"] for n, ours in MODULEFORMER.items()})
    real = ~golden["pad"] if padded else None
    output = layer(x, x, x, AttentionMask(True, real, real))
    (loss,) = layer.router.losses(output.statistics["query"]).values()
    main = (output.y * golden["grad_y"]).sum()
    (main if padded else main + loss).backward()
    y = output.y if real is None else output.y[real]
    close(y, golden["y"] if real is None else golden["y"][real])
    if not padded:  # their loss counts padding
        # They add 1e-8 to the mean probability within its logarithm.
        assert abs(loss / 3.0 - golden["aux"].item()) < 1e-6
    for name, ours in MODULEFORMER.items():
        gradient = golden[f"grad.{name}"]
        error = (layer.get_parameter(ours).grad - gradient).norm()
        assert error <= (1e-9 if padded else 1e-6) * gradient.norm(), name
