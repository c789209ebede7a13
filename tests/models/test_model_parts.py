"""Parts that other models have too, against transformers' own modules."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moa_dist.config.attention import DenseAttentionConfig
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.models.attention import DenseAttention
from moa_dist.models.feed_forward import MoEFeedForward
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.mask import AttentionMask
from moa_dist.models.rope import Rotation, attention_factor, turning_speed

D, T, HEADS, D_HEAD = 32, 11, 4, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Theirs pass through fp32."""
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Rotary positions.


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"rope_type": "linear", "factor": 1.0}),
        ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"kind": "yarn", "factor": 4.0, "original_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                "kind": "yarn", "factor": 8.0, "original_length": 4096, "fast_turns": 16.0,
                "slow_turns": 2.0, "attention_factor": 1.3, "whole_pairs": False,
            },
            {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
                "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False,
            },
        ),
        (  # of a width with one blended pair
            {"kind": "yarn", "factor": 2.0, "original_length": 8},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
        ),
    ],
    ids=["plain", "linear", "yarn", "yarn with all its fields", "yarn of a short text"],
)  # fmt: skip
@pytest.mark.parametrize("base", [10000.0, 1e6])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotations_are_those_of_transformers(ours, theirs, base, fraction):
    rope = RopeConfig.model_validate({"fraction": fraction, "base": base, "scaling": ours or None})
    parameters = theirs | {"rope_theta": base, "partial_rotary_factor": fraction}
    settings = Qwen3Config(
        hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=parameters
    )
    speed, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](settings, torch.device("cpu"))
    found = turning_speed(64, rope, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(found, speed.double(), rtol=1e-5, atol=1e-9)
    assert attention_factor(rope) == pytest.approx(factor)


def test_the_factor_multiplies_queries_and_keys():
    scaling = {"kind": "yarn", "factor": 2.0, "original_length": 16, "attention_factor": 3.0}
    rope = RopeConfig.model_validate({"fraction": 1.0, "scaling": scaling})
    rotation = Rotation.at(torch.arange(5)[None], 8, rope, torch.float64)
    torch.testing.assert_close(
        rotation.cos.square() + rotation.sin.square(), torch.full((1, 1, 5, 4), 9.0).double()
    )


# Attention.


def copied(theirs: torch.nn.Module, config: DenseAttentionConfig, offset: float) -> DenseAttention:
    """A layer of ours with the same weights; `offset` is added to those of norms."""
    ours = DenseAttention(config, D, 1.0).double()
    for name, parameter in theirs.named_parameters():
        own = name.removesuffix(".weight")
        shift = offset if own.endswith("norm") else 0.0
        weight = ours.get_submodule(PROJECTIONS.get(own, own)).weight
        weight.data.copy_(parameter + shift)
    return ours


def seen(window: int | None) -> torch.Tensor:
    """Their mask: 0 or -inf, [1, 1, T, T]."""
    query, key = torch.arange(T)[:, None], torch.arange(T)[None]
    visible = sliding_window_causal_mask_function(window or T)(0, 0, query, key)
    return torch.zeros(1, 1, T, T).double().masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "full"])
def test_dense_attention_is_that_of_gemma_2(layer):
    """Windows, soft-capped logits, shared keys and values."""
    settings = Gemma2Config(
        hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=D_HEAD,
        query_pre_attn_scalar=D_HEAD, sliding_window=4, attn_logit_softcapping=1.5,
        num_hidden_layers=2, attn_implementation="eager",
    )  # fmt: skip
    theirs = Gemma2Attention(settings, layer_idx=layer).double().eval()
    fill(theirs)
    config = DenseAttentionConfig.model_validate(
        {
            "num_heads": HEADS,
            "num_kv_heads": 2,
            "d_head": D_HEAD,
            "rope": {"fraction": 1.0},
            "soft_cap": 1.5,
            "window": {"size": 4, "full_every": 2},
        }
    )
    x, position, window = inputs(2, T, D), torch.arange(T)[None], config.window.size_in(layer)
    assert window == theirs.sliding_window
    expected, _ = theirs(x, Gemma2RotaryEmbedding(settings)(x, position), seen(window))
    rotation = Rotation.at(position, D_HEAD, config.rope, torch.float64)
    mask = AttentionMask(True, rotation=rotation, window=window)
    y = copied(theirs, config, 0.0)(x, x, x, mask).y
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize("layer", [4, 5], ids=["window", "full"])
def test_dense_attention_is_that_of_gemma_3(layer):
    """Other rotations in layers with a window, of which five come before one without."""
    settings = Gemma3TextConfig(
        hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=1, head_dim=D_HEAD,
        query_pre_attn_scalar=D_HEAD, sliding_window=4, num_hidden_layers=6,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = Gemma3Attention(settings, layer_idx=layer).double().eval()
    fill(theirs)
    config = DenseAttentionConfig.model_validate(
        {
            "num_heads": HEADS,
            "num_kv_heads": 1,
            "d_head": D_HEAD,
            "qk_norm": True,
            "rope": {"fraction": 1.0, "base": 1e6},
            "window": {"size": 4, "full_every": 6, "rope": {"fraction": 1.0}},
        }
    )
    x, position, window = inputs(2, T, D), torch.arange(T)[None], config.window.size_in(layer)
    assert window == theirs.sliding_window
    tables = Gemma3RotaryEmbedding(settings)(x, position, settings.layer_types[layer])
    expected, _ = theirs(x, tables, seen(window))
    rope = config.rope if window is None else config.window.rope
    rotation = Rotation.at(position, D_HEAD, rope, torch.float64)
    y = copied(theirs, config, 1.0)(x, x, x, AttentionMask(True, rotation=rotation, window=window))
    torch.testing.assert_close(y.y, expected, **CLOSE)


def qwen3(num_layers: int) -> tuple[Qwen3ForCausalLM, LanguageModel]:
    """Whole models with equal weights: YaRN, and windows but for every third layer."""
    types = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(num_layers)]
    settings = Qwen3Config(
        vocab_size=31, hidden_size=D, intermediate_size=24, num_hidden_layers=num_layers,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=D_HEAD, layer_types=types,
        use_sliding_window=True, sliding_window=4, tie_word_embeddings=False,
        max_position_embeddings=64, attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(settings).double().eval()
    fill(theirs)
    config = {
        "vocab_size": 31,
        "d_model": D,
        "num_layers": num_layers,
        "norm": "rmsnorm",
        "norm_eps": settings.rms_norm_eps,
        "head_bias": False,
        "attention": {
            "kind": "dense",
            "num_heads": HEADS,
            "num_kv_heads": 2,
            "d_head": D_HEAD,
            "qk_norm": True,
            "rope": {
                "fraction": 1.0,
                "scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16},
            },
            "window": {"size": 4, "full_every": 3},
        },
        "ffn": {"kind": "dense", "d_ff": 24, "gated": True, "activation": "silu"},
    }
    ours = build_model(ModelConfig.model_validate(config)).double().eval()
    own = ours.state_dict()
    names = {
        "model.layers": "stack.layers", "self_attn": "attention", "input_layernorm":
        "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn.up",
        "mlp.up_proj": "ffn.gate", "mlp.down_proj": "ffn.down", "model.norm": "final_norm",
        "model.embed_tokens": "embedding", "lm_head": "head", **PROJECTIONS,
    }  # fmt: skip
    for name, value in theirs.state_dict().items():
        for before, after in names.items():
            name = name.replace(before, after)
        own.pop(name).copy_(value)
    assert not own
    return theirs, ours


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_with_windows_is_qwen3(shared):
    """Logits, whole and with a cache; the pattern runs over repeats of shared layers."""
    theirs, ours = qwen3(6)
    if shared:
        for i, layer in enumerate(theirs.model.layers):
            layer.load_state_dict(theirs.model.layers[i % 2].state_dict())
        fields = ours.config.model_dump() | {"num_distinct_layers": 2}
        state = {n: v for n, v in ours.state_dict().items() if not n.startswith("stack.layers.")}
        state |= {
            n: v
            for n, v in ours.state_dict().items()
            if n.startswith(("stack.layers.0", "stack.layers.1"))
        }
        ours = build_model(ModelConfig.model_validate(fields)).double().eval()
        ours.load_state_dict(state)
    tokens = torch.randint(31, (2, 14), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        cache, pieces = ours.empty_cache(), []
        for piece in tokens.split([7, 1, 1, 5], 1):
            output = ours(piece, None, cache)
            cache = output.cache
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


# Experts.


def moe(**fields: object) -> MoEFeedForward:
    router = {"num_experts": 8, "top_k": 3, **fields.pop("router")}
    section = {"d_expert": 6, "gated": True, "activation": "silu", "router": router, **fields}
    return MoEFeedForward(MoEFFNConfig.model_validate(section), D, 1.0).double()


def copy_experts(ours: MoEFeedForward, theirs: torch.nn.Module, shared: torch.nn.Module) -> None:
    gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
    ours.router.logits.weight.data.copy_(theirs.gate.weight)
    for experts, weight in (
        (ours.up, gate),
        (ours.gate, up),
        (ours.down, theirs.experts.down_proj),
    ):
        experts.weight.data.copy_(weight.mT)
    dense = ours.shared.ffn
    for linear, name in ((dense.up, "gate"), (dense.gate, "up"), (dense.down, "down")):
        linear.weight.data.copy_(shared.get_submodule(f"{name}_proj").weight)


@pytest.mark.parametrize("normalized", [False, True])
def test_experts_are_those_of_deepseek_v3(normalized):
    """Groups of experts, a bias that chooses, scaled weights, two shared experts."""
    settings = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=6, n_routed_experts=8, num_experts_per_tok=3,
        n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=normalized,
    )  # fmt: skip
    theirs = DeepseekV3MoE(settings).double()
    fill(theirs)
    theirs.gate.e_score_correction_bias = torch.linspace(0.3, -0.3, 8).double()
    ours = moe(
        shared_expert={"d_expert": 12},
        router={
            "score": "sigmoid",
            "gate": "renormalized" if normalized else "raw",
            "route_scale": 2.5,
            "group_limit": {"num_groups": 4, "top_groups": 2},
            "balance": {"bias_rate": 0.001},
        },
    )
    copy_experts(ours, theirs, theirs.shared_experts)
    ours.router.bias.value.copy_(theirs.gate.e_score_correction_bias)
    x = inputs(4, T, D)
    # The limit decides: without it, other experts are chosen.
    chosen = ours.router(x).topk_ids.flatten(1).sort().values
    assert torch.equal(chosen, theirs.gate(x)[2].sort().values)
    assert (chosen // 2).unique(dim=0).shape[0] > 3
    assert all(len(set(row)) <= 2 for row in (chosen // 2).tolist())
    torch.testing.assert_close(ours(x, x, None).y, theirs(x), **CLOSE)


def test_experts_are_those_of_qwen2_moe():
    """A shared expert of another width, behind a sigmoid."""
    settings = Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=6, num_experts=8, num_experts_per_tok=3,
        shared_expert_intermediate_size=10, norm_topk_prob=False,
    )  # fmt: skip
    theirs = Qwen2MoeSparseMoeBlock(settings).double()
    fill(theirs)
    ours = moe(shared_expert={"d_expert": 10, "sigmoid_gate": True}, router={"score": "softmax"})
    copy_experts(ours, theirs, theirs.shared_expert)
    ours.shared.gate.weight.data.copy_(theirs.shared_expert_gate.weight)
    x = inputs(4, T, D)
    torch.testing.assert_close(ours(x, x, None).y, theirs(x), **CLOSE)
