"""Outputs, losses and every gradient equal those of the authors' released code, in fp64.

tests/golden/ holds inputs, parameters, outputs and gradients printed by running it. Two
places there pass through fp32: MoEUT's attention selectors and MoA's auxiliary loss.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moa_dist.config.attention import MoAConfig, SwitchHeadConfig
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.routers import BalanceConfig, RouterConfig
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moa import MoAAttention
from moa_dist.moe.losses import balance_losses

GOLDEN = Path(__file__).parent.parent / "golden"

MOEUT_NAMES = {
    "attention.q.weight": "attention.q.weight",
    "attention.k.weight": "attention.k.weight",
    "attention.v": "attention.v.weight",
    "attention.o": "attention.o.weight",
    "attention.sel_v": "attention.value_router.logits.weight",
    "attention.sel_o": "attention.output_router.logits.weight",
    "ffn.keys": "ffn.up.weight",
    "ffn.values": "ffn.down.weight",
    "ffn.expert_sel": "ffn.router.logits.weight",
    "ln1.weight": "attention_norm.weight",
    "ln1.bias": "attention_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
}


def our_moeut_name(name: str) -> str:
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"stack.layers.{layer}.{MOEUT_NAMES[rest]}"


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_moeut_language_model():
    golden = load_file(GOLDEN / "moeut_tiny.safetensors")
    router = {"score": "sigmoid"}
    config = ModelConfig(
        vocab_size=97,
        d_model=32,
        num_layers=4,
        num_distinct_layers=2,
        norm_placement="peri",
        attention=SwitchHeadConfig(
            num_heads=2,
            d_head=16,
            router=RouterConfig(
                num_experts=4, top_k=2, balance=BalanceConfig(entropy=0.001), **router
            ),
        ),
        ffn=MoEFFNConfig(
            d_expert=16,
            router=RouterConfig(
                num_experts=12, top_k=3, balance=BalanceConfig(entropy=0.01), **router
            ),
        ),
    )
    model = LanguageModel(config).double()
    parameters = {
        our_moeut_name(name.removeprefix("param.")): value
        for name, value in golden.items()
        if name.startswith("param.")
    }
    model.load_state_dict(parameters)

    tokens = golden["tokens"]
    output = model(tokens[:, :-1])
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    aux_losses = sum(output.aux_losses.values())
    (cross_entropy + aux_losses).backward()

    assert relative_error(output.logits, golden["logits"]) < 1e-5
    assert relative_error(cross_entropy, golden["cross_entropy"]) < 1e-5
    assert relative_error(aux_losses, golden["regularisation"].double()) < 1e-5  # codespell:ignore
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == parameters.keys()
    for name, value in golden.items():
        if name.startswith("grad."):
            ours = gradients[our_moeut_name(name.removeprefix("grad."))]
            assert relative_error(ours, value) < 1e-5, name


@pytest.mark.parametrize(
    ("name", "bound"),
    [("moa_self_causal", 1e-6), ("moa_self_causal_padded", 1e-9), ("moa_cross_padded", 1e-9)],
)
def test_moa_attention(name, bound):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    causal, padded = "causal" in name, "padded" in name
    balance = BalanceConfig() if padded else BalanceConfig(switch=0.01, z_loss=0.001)
    x = golden["x"].requires_grad_()
    config = MoAConfig(
        d_head=8,
        rope=None,
        # The authors take their statistics over the whole batch.
        router=RouterConfig(
            num_experts=6, top_k=3, score="softmax", group_sequences=len(x), balance=balance
        ),
    )
    layer = MoAAttention(config, d_model=24, init_scale=1.0).double()
    names = {
        "w_gate": "router.logits.weight",
        "w_q": "q.weight",
        "w_k": "k.weight",
        "w_v": "v.weight",
        "w_o": "o.weight",
    }

    def ours(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.T if name == "w_gate" else value

    layer.load_state_dict({names[n]: ours(n, golden[f"param.{n}"]) for n in names})
    memory = golden["memory"].requires_grad_() if "memory" in golden else x
    mask = AttentionMask(
        causal=causal,
        query_mask=~golden["query_pad"] if padded else None,
        key_mask=~golden["key_pad"] if padded else None,
    )
    output = layer(x, memory, memory, mask)
    aux_losses = sum(balance_losses(output.statistics["query"], balance).values())
    ((output.y * golden["grad_y"]).sum() + aux_losses).backward()

    assert relative_error(output.y, golden["y"]) < bound
    if not padded:
        assert relative_error(aux_losses, golden["aux"].squeeze()) < bound
    for n in names:
        gradient = layer.get_parameter(names[n]).grad
        assert relative_error(gradient, ours(n, golden[f"grad.{n}"])) < bound, n
    for n, value in (("x", x), ("memory", memory)):
        if f"grad.{n}" in golden:
            assert relative_error(value.grad, golden[f"grad.{n}"]) < bound, n
    if padded:
        assert not output.y[golden["query_pad"]].any()
