"""Shared keys and values, and normalized queries and keys, of every attention kind."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from moa_dist.config.attention import DenseAttentionConfig
from moa_dist.config.model import ModelConfig
from moa_dist.models.attention import DenseAttention
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.mask import AttentionMask
from moa_dist.models.rope import Rotation
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, router
from tests.distributed.test_engine import check, stage

D, T = 32, 11
GROUPED = {"kind": "dense", "num_heads": 4, "num_kv_heads": 2, "d_head": 8, "qk_norm": True}
KINDS = {
    "dense": GROUPED,
    "moa": MOA | {"qk_norm": True, "heads_per_expert": 2, "router": router(5, 2, "softmax")},
    "switchhead": SWITCHHEAD | {"qk_norm": True, "router": router(3, 2)},
}


def model_with(attention: dict) -> LanguageModel:
    config = {
        "vocab_size": 31,
        "d_model": D,
        "num_layers": 2,
        "attention": attention,
        "ffn": {"kind": "dense", "d_ff": 24},
    }
    model = build_model(ModelConfig.model_validate(config)).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:  # which start at 1
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def test_dense_attention_is_that_of_qwen3():
    config = DenseAttentionConfig.model_validate(GROUPED | {"rope": {"fraction": 1.0}})
    settings = Qwen3Config(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
        max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    ours = DenseAttention(config, D, 1.0).double()
    theirs = Qwen3Attention(settings, layer_idx=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    for name, parameter in theirs.named_parameters():
        parameter.data.uniform_(0.2, 1.2, generator=generator)
        own = names.get(name.removesuffix(".weight"), name.removesuffix(".weight"))
        ours.get_submodule(own).weight.data.copy_(parameter)
    x = torch.randn(2, T, D, generator=generator, dtype=torch.float64)
    position = torch.arange(T)[None]
    tables = Qwen3RotaryEmbedding(settings)(x, position)
    expected, _ = theirs(x, tables, attention_mask=None)
    mask = AttentionMask(True, rotation=Rotation.at(position, 8, config.rope, torch.float64))
    # Its norms and tables pass through fp32.
    assert torch.allclose(ours(x, x, x, mask).y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind):
    model = model_with(KINDS[kind])
    tokens = torch.randint(31, (2, T), generator=torch.Generator().manual_seed(1))
    whole = model(tokens).logits
    first = model(tokens[:, :6], None, model.empty_cache())
    second = model(tokens[:, 6:], None, first.cache)
    logits = torch.cat([first.logits, second.logits], 1)
    assert torch.allclose(logits, whole, rtol=1e-9, atol=1e-12)
    assert first.cache.layers[0][0].shape == (2, 2, 6, 8)  # of two heads in every kind


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_queries_and_keys_does_not_matter(kind):
    model = model_with(KINDS[kind])
    tokens = torch.randint(31, (2, T), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.q.weight", "attention.k.weight")):
            parameter.data *= 100
    assert torch.allclose(model(tokens).logits, before, atol=1e-3)  # there is an eps


def test_traces_have_every_head():
    model = model_with(KINDS["dense"])
    traces = model(torch.zeros(1, T, dtype=torch.long), trace=True).traces
    assert all(trace.heads["attention"].summary.entropy.shape[1] == 4 for trace in traces.values())


def test_heads_of_keys_divide_those_of_queries():
    config = DenseAttentionConfig(num_heads=4, num_kv_heads=3, d_head=8)
    (problem,) = config.problems("model.attention")
    assert problem.keys == ("model.attention.num_kv_heads", "model.attention.num_heads")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_step_equals_one_process(pools, kind, zero_stage):
    ffn = {"kind": "moe", "d_expert": 8, "router": router(5, 2)}
    model = {"attention": KINDS[kind], "ffn": ffn}
    check(pools, Case(**stage(zero_stage), optimizer="adamw", eps=1e-3, model=model))
