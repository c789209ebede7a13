"""RMoE: what its authors' code computes, in fp64, over a stack of layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moa_dist.config.model import ModelConfig
from moa_dist.models.aux_losses import aux_losses
from moa_dist.models.language_model import build_model
from moa_dist.models.mask import AttentionMask, LayerMasks
from tests.models.small import ATTENTION, small_model, tokens_of

GOLDEN = Path(__file__).parent.parent / "golden" / "relatives" / "rmoe_stack.safetensors"
LAYERS, TOP_K = 3, 2
CONFIG = {
    "vocab_size": 8,
    "d_model": 24,
    "num_layers": LAYERS,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "attention": {
        "kind": "dense",
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_head": 6,
        "rope": {"fraction": 1.0},
    },
    "ffn": {
        "kind": "moe",
        "d_expert": 8,
        "gated": True,
        "activation": "silu",
        "router": {
            "kind": "recurrent",
            "d_state": 12,
            "num_experts": 6,
            "top_k": TOP_K,
            "score": "softmax",
            "gate": "renormalized",
            # Their loss adds up the shares of all choices, ours is their mean.
            "balance": {"switch": 0.01 * TOP_K, "pool_layers": True, "scope": "micro_batch"},
        },
    },
}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def ours_of(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Their tensors by our names, all layers' cell in the first one."""
    theirs = {
        n.removeprefix(f"{prefix}."): v for n, v in golden.items() if n.startswith(f"{prefix}.")
    }
    cell = {
        f"stack.layers.0.ffn.router.cell.{ours}": torch.cat(
            [theirs[f"rnn_router.{kind}{gate}"] for gate in "rzn"]
        )
        for ours, kind in (
            ("input.weight", "w_i"),
            ("past.weight", "w_h"),
            ("input_bias", "b_i"),
            ("past_bias", "b_h"),
        )
    }
    layers = {}
    for i in range(LAYERS):
        own = {n.removeprefix(f"layers.{i}."): v for n, v in theirs.items()}
        layers |= {
            f"stack.layers.{i}.{name}": value
            for name, value in {
                "attention_norm.weight": own["input_layernorm"],
                "ffn_norm.weight": own["post_attention_layernorm"],
                **{f"attention.{p}.weight": own[f"{p}_proj"] for p in "qkvo"},
                "ffn.router.project.weight": own["router_in"],
                "ffn.router.logits.weight": own["router_out"],
                # Ours activates what is called up.
                "ffn.up.weight": own["expert_gate"].transpose(1, 2),
                "ffn.gate.weight": own["expert_up"].transpose(1, 2),
                "ffn.down.weight": own["expert_down"].transpose(1, 2),
            }.items()
        }
    return cell | layers | {"final_norm.weight": theirs["norm"]}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_it_computes_what_its_authors_do(recompute):
    golden = load_file(GOLDEN)
    model = build_model(ModelConfig.model_validate(CONFIG), recompute=recompute).double()
    missing = model.load_state_dict(ours_of(golden, "param"), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"embedding.weight", "head.weight", "head.bias"}
    x = golden["x"].requires_grad_()
    # Padding is no key, but is routed and counted.
    mask = AttentionMask(True, None, golden["attention_mask"].bool())
    output = model.stack(x, LayerMasks(mask, mask), trace=not recompute)
    y = model.final_norm(output.x)
    (aux,) = aux_losses(output.statistics, model.routers()).values()
    close(aux, 0.01 * golden["aux_loss"])
    real = golden["attention_mask"].bool()
    close(y[real], golden["y"][real])
    if not recompute:
        for i, trace in enumerate(output.traces.values()):
            routing = trace.routing["ffn"]
            close(routing.state, golden[f"state.{i}"])
            close(routing.topk_weights.flatten(), golden[f"gate.{i}"].flatten())
        total, number = output.token_sums["state_norm/layer2.repeat0.ffn"]
        close(total / number, golden["state.2"].norm(dim=-1).mean())
    ((y * golden["grad_y"]).sum() + aux).backward()
    close(x.grad, golden["grad.x"])
    for name, gradient in ours_of(golden, "grad").items():
        close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("attention", ["moa", "switchhead"])
def test_states_go_through_translation_sharing_and_caches(attention):
    """The state of a source's tokens goes through the values of the decoder's layers, too."""
    recurrent = {"kind": "recurrent", "d_state": 5, "num_experts": 4, "top_k": 2}
    model = small_model(
        attention=ATTENTION[attention] | {"router": recurrent | {"score": "softmax"}},
        ffn={"kind": "moe", "d_expert": 4, "router": recurrent | {"score": "sigmoid"}},
        objective="translation",
        position="sinusoidal",
        num_layers=4,
        num_distinct_layers=2,
        sharing={"own": ["norms"]},
    )
    cells = [name for name, _ in model.named_modules() if name.endswith("cell")]
    routers = {router for stack in (model.encoder, model.stack) for _, router in stack.routers()}
    assert len(cells) == len(routers) + len(routers - {r for r in routers if ".cross." in r})
    target, source = tokens_of(), tokens_of(2, 6, seed=1)
    whole = model(target, source=source).logits
    first = model(target[:, :5], cache=model.empty_cache(), source=source)
    second = model(target[:, 5:], cache=first.cache)
    parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    whole.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "cell" in name)
