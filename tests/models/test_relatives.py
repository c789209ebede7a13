"""Relatives compute what their authors' code computes: outputs, losses, gradients, in fp64.

tests/golden/relatives/ holds inputs, parameters, outputs and gradients printed by running it.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moa_dist.config.family import ReLURouterConfig
from moa_dist.config.model import BalanceConfig, MoEFFNConfig
from moa_dist.models.feed_forward import MoEFeedForward
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
