"""Relatives compute what their authors' code computes: outputs, losses, gradients, in fp64.

tests/golden/relatives/ holds inputs, parameters, outputs and gradients printed by running it.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from moa_dist.config.attention import MoAConfig
from moa_dist.config.family import (
    ComposedAttentionConfig,
    GShardRouterConfig,
    MLPRouterConfig,
    MoHConfig,
    ReLURouterConfig,
    ResidualMoEConfig,
)
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.config.routers import BalanceConfig, CapacityConfig, RouterConfig
from moa_dist.models.attention import Heads
from moa_dist.models.composed_attention import ComposedAttention
from moa_dist.models.feed_forward import MoEFeedForward
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moa import MoAAttention
from moa_dist.models.moh import MoHAttention
from moa_dist.models.residual_moe import ResidualMoE
from moa_dist.moe.adapt import StepLoad, adapt
from moa_dist.moe.statistics import own_sums

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
            loads[i] = StepLoad(
                statistics.load.sum(0), statistics.num_tokens.sum(), own_sums(statistics)
            )
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


def of_moh(golden: dict[str, Tensor], prefix: str, d: int) -> dict[str, Tensor]:
    """Their tensors by our names: heads of all three projections are cut out of one matrix."""
    width, shared = len(golden[f"{prefix}.b_qkv"]) // 3, 2
    qkv = zip("qkv", golden[f"{prefix}.w_qkv"].split(width), strict=True)
    biases = zip("qkv", golden[f"{prefix}.b_qkv"].split(width), strict=True)
    out = golden[f"{prefix}.w_o"]
    return {
        **{f"{name}.weight": value for name, value in qkv},
        **{f"{name}.bias": value for name, value in biases},
        "stage_gate.weight": golden[f"{prefix}.w_stage"],
        "shared_gate.weight": golden[f"{prefix}.w_shared"],
        "router.logits.weight": golden[f"{prefix}.w_routed"],
        "shared_o.weight": out[:, : shared * d],
        "o.weight": out[:, shared * d :].T.unflatten(0, (-1, d)),
        "bias.value": golden[f"{prefix}.b_o"],
    }


def test_moh():
    golden = load_file(GOLDEN / "moh_dit.safetensors")
    x = golden["x"].requires_grad_()
    top_k = 2
    # Their loss is not divided by the number of choices.
    router = RouterConfig(
        num_experts=5,
        top_k=top_k,
        score="softmax",
        gate="renormalized",
        group_sequences=len(x),
        balance=BalanceConfig(switch=5.0 * top_k),
    )
    config = MoHConfig(num_shared_heads=2, d_head=5, rope=None, bias=True, router=router)
    layer = MoHAttention(config, 30, 1.0).double()
    layer.load_state_dict(of_moh(golden, "param", d=5))
    output = layer(x, x, x, AttentionMask(causal=False))
    (loss,) = layer.router.losses(output.statistics["query"]).values()
    ((output.y * golden["grad_y"]).sum() + loss).backward()
    close(output.y, golden["y"])
    close(loss, 5.0 * golden["aux"].squeeze())
    close(x.grad, golden["grad.x"])
    for name, gradient in of_moh(golden, "grad", d=5).items():
        ours = layer.get_parameter(name).grad
        # Biases of keys have none, but for rounding.
        assert (ours - gradient).norm() <= BOUND * max(gradient.norm(), 1e-3), name


class ViTHeads(MoHAttention):
    """Heads as in MoH-ViT: cosines with learned temperatures and biases by distance in an image."""

    def attend(self, q, k, v, context, product=None):
        value = self.vit
        table = F.relu(F.linear(self.table, value["cpb_in"], value["cpb_in_bias"]))
        bias = F.linear(table, value["cpb_out"], value["cpb_out_bias"])[self.index]
        bias = bias.T.unflatten(-1, (q.shape[2], -1))
        scale = F.softplus(value["temperature"]) * self.length_scale
        q = (F.normalize(q, dim=-1) + value["query_embedding"]) * scale
        attention = (q @ F.normalize(k, dim=-1).mT + bias).softmax(-1)
        return Heads(attention @ v, q, k, None)


VIT = (
    "cpb_in",
    "cpb_in_bias",
    "cpb_out",
    "cpb_out_bias",
    "query_embedding",
    "temperature",
)


def test_moh_in_a_vision_transformer():
    """What is ours, gates and projections, within their attention over an image."""
    golden = load_file(GOLDEN / "moh_vit.safetensors")
    x = golden["x"].requires_grad_()
    router = RouterConfig(
        num_experts=6,
        top_k=3,
        score="softmax",
        gate="renormalized",
        group_sequences=len(x),
        balance=BalanceConfig(switch=5.0 * 3),
    )
    config = MoHConfig(num_shared_heads=2, d_head=4, rope=None, bias=True, router=router)
    layer = ViTHeads(config, 32, 1.0).double()
    layer.load_state_dict(of_moh(golden, "param", d=4))
    layer.vit = {name: golden[f"param.{name}"].requires_grad_() for name in VIT}
    layer.table, layer.index = golden["relative_coords_table"], golden["relative_pos_index"]
    layer.length_scale = golden["seq_length_scale"]
    output = layer(x, x, x, AttentionMask(causal=False))
    (loss,) = layer.router.losses(output.statistics["query"]).values()
    ((output.y * golden["grad_y"]).sum() + loss).backward()
    close(output.y, golden["y"])
    close(loss, 5.0 * golden["aux"].squeeze())
    close(x.grad, golden["grad.x"])
    ours = {name: layer.get_parameter(name).grad for name in of_moh(golden, "grad", d=4)}
    theirs = of_moh(golden, "grad", d=4) | {name: golden[f"grad.{name}"] for name in VIT}
    for name, gradient in (ours | {name: layer.vit[name].grad for name in VIT}).items():
        # Biases of keys and of all logits have none, but for rounding.
        assert (gradient - theirs[name]).norm() <= BOUND * max(theirs[name].norm(), 1e-3), name


def of_residual_moe(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Their tensors by our names: a bias of hidden units is the last row of our weight."""
    value = {
        n.removeprefix(f"{prefix}."): v for n, v in golden.items() if n.startswith(f"{prefix}.")
    }
    up = torch.cat([value["expert_in"].transpose(1, 2), value["expert_in_bias"][:, None]], dim=1)
    return {
        "router.logits.weight": value["w_gate"],
        "up.weight": up,
        "down.weight": value["expert_out"].transpose(1, 2),
        "down_bias.value": value["expert_out_bias"],
        "dense.up.weight": value["mlp_in"],
        "dense.up.bias": value["mlp_in_bias"],
        "dense.down.weight": value["mlp_out"],
        "dense.down.bias": value["mlp_out_bias"],
        "mix.weight": value["coefficient"],
        "mix.bias": value["coefficient_bias"],
    }


RESIDUAL_MOE: dict[str, RouterConfig] = {
    "top1": RouterConfig(
        num_experts=6,
        top_k=1,
        score="softmax",
        group_sequences=2,
        balance=BalanceConfig(switch=3.0),
    ),
    "top2": GShardRouterConfig(num_experts=6, top_k=2, first_choice=3.0, group_sequences=2),
    "top2_capacity": GShardRouterConfig(
        num_experts=6,
        top_k=2,
        first_choice=3.0,
        group_sequences=2,
        capacity=CapacityConfig(factor=0.75, policy="choice"),
    ),
}


@pytest.mark.parametrize("name", RESIDUAL_MOE)
def test_residual_moe(name):
    golden = load_file(GOLDEN / f"residual_moe_{name}.safetensors")
    x = golden["x"].requires_grad_()
    router = RESIDUAL_MOE[name]
    config = ResidualMoEConfig(d_expert=20, d_ff=20, activation="gelu", bias=True, router=router)
    layer = ResidualMoE(config, 24, 1.0).double()
    layer.load_state_dict(of_residual_moe(golden, "param"))
    output = layer(x, x, None)
    statistics = output.statistics[""]
    (balance,) = layer.router.losses(statistics).values()
    ((output.y * golden["grad_y"]).sum() + balance).backward()
    close(output.y, golden["y"])
    close(balance, 3.0 * golden["aux"].squeeze())
    close(x.grad, golden["grad.x"])
    assert torch.equal(statistics.load.flatten(), golden["expert_counts"])
    assert (statistics.dropped.sum() > 0) == (name == "top2_capacity")
    for ours, gradient in of_residual_moe(golden, "grad").items():
        close(layer.get_parameter(ours).grad, gradient)


def of_dcmha(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    value = {
        n.removeprefix(f"{prefix}."): v for n, v in golden.items() if n.startswith(f"{prefix}.")
    }
    return {
        **{f"{name}.weight": value[f"w_{name}"] for name in "qkvo"},
        "compose.hidden.weight": value["dw1"].flatten(1).T,
        "compose.gather": value["qkw"][:, :, :2].flatten(2),
        "compose.spread": value["qkw"][:, :, 2:].flatten(2),
        "compose.diagonal.weight": value["dd"].flatten(1).T,
        **{f"{name}.weight": value[name] for name in ("q_norm", "k_norm") if name in value},
    }


@pytest.mark.parametrize(
    ("name", "d_head", "window"), [("dcmha_causal", 6, None), ("dcmha_qknorm_window", 8, 5)]
)
def test_dcmha(name, d_head, window):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    x = golden["x"].requires_grad_()
    config = ComposedAttentionConfig(
        num_heads=4,
        d_head=d_head,
        d_compose=16,
        qk_norm=window is not None,
        rope=RopeConfig(fraction=1.0),
    )
    layer = ComposedAttention(config, x.shape[-1], 1.0).double()
    layer.load_state_dict(of_dcmha(golden, "param"))
    real = ~golden["key_pad"] if "key_pad" in golden else golden["mask"][:, 0].any(-1)
    mask = AttentionMask(True, real, real, window=window)
    output = layer(x, x, x, mask)
    (output.y * golden["grad_y"]).sum().backward()
    close(output.y[real], golden["y"][real])
    close(x.grad, golden["grad.x"])
    for name, gradient in of_dcmha(golden, "grad").items():
        close(layer.get_parameter(name).grad, gradient)
