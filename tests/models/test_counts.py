"""Counts agree with the papers' tables and with the models."""

from pathlib import Path

import pytest

from moa_dist.config import Config, load_config
from moa_dist.config.attention import SwitchHeadConfig
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.models.counts import count
from moa_dist.models.language_model import LanguageModel
from moa_dist.moe.experts import expert_layers

CONFIGS = Path(__file__).parents[2] / "configs"

# MoEUT (arXiv 2405.16039): size -> parameters in millions, multiply-accumulates in billions
# of one forward over 1024 tokens for MoEUT and for its dense baseline, without the head.
PUBLISHED = {
    "44m": (44.35, 46.2, 52.5),
    "126m": (125.67, 94.5, 141.7),
    "244m": (243.33, 162.3, 271.1),
    "318m": (318.11, 215.2, 361.5),
    "727m": (727.42, 494.5, 821.4),
    "1b": (1040.32, 700.3, 1159.6),
}
LENGTH = 1024


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_moeut_sizes(size):
    parameters, giga_macs, _ = PUBLISHED[size]
    config = load_config(CONFIGS / "moeut" / f"{size}.yaml").model
    counts = count(config, LENGTH)
    assert counts.total / 1e6 == pytest.approx(parameters, rel=0.005)
    # Ours are a little higher (next test), never lower.
    assert giga_macs <= counts.training.block_macs / 1e9 <= 1.01 * giga_macs


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_moeut_macs_count_the_attention_routers_for_one_head(size):
    """The whole difference: theirs has two selectors of one head and the gating of the FFN."""
    config = load_config(CONFIGS / "moeut" / f"{size}.yaml").model
    attention, ffn = config.attention, config.ffn
    assert isinstance(attention, SwitchHeadConfig)
    assert isinstance(ffn, MoEFFNConfig)
    selector = 2 * config.d_model * attention.router.num_experts
    gating = ffn.router.top_k * ffn.d_expert
    per_layer = selector + gating - attention.num_heads * selector
    theirs = count(config, LENGTH).training.block_macs + LENGTH * config.num_layers * per_layer
    assert round(theirs / 1e9, 1) == PUBLISHED[size][1]


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_dense_baselines(size):
    counts = count(load_config(CONFIGS / "dense" / f"{size}.yaml").model, LENGTH)
    assert round(counts.training.block_macs / 1e9, 1) == PUBLISHED[size][2]
    # The baselines are as large as the MoEUT of the same name, and all of it is active.
    assert counts.total / 1e6 == pytest.approx(PUBLISHED[size][0], rel=0.01)
    assert counts.training.active == counts.total == counts.dense


def small(attention: str = "switchhead", ffn: str = "moe", **other) -> Config:
    """A configuration whose experts 2, 3 and 4 ranks share unevenly."""

    def router(num_experts):
        return {"num_experts": num_experts, "top_k": 2, "score": "sigmoid"}

    kinds = {
        "dense": {"kind": "dense", "num_heads": 2, "d_head": 8},
        "moa": {"kind": "moa", "d_head": 8, "router": router(5)},
        "switchhead": {"kind": "switchhead", "num_heads": 3, "d_head": 8, "router": router(3)},
    }
    ffns = {
        "dense": {"kind": "dense", "d_ff": 32},
        "moe": {"kind": "moe", "d_expert": 12, "gated": True, "router": router(7)},
    }
    model = {
        "vocab_size": 50,
        "d_model": 16,
        "num_layers": 4,
        "num_distinct_layers": 2,
        "attention": kinds[attention],
        "ffn": ffns[ffn],
    }
    return Config.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"train": "data", "sequence_length": 32},
            "train": {"steps": 1, "global_batch": 8, "micro_batch": 1},
            **other,
        }
    )


@pytest.mark.parametrize("attention", ["dense", "moa", "switchhead"])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_parameters_are_those_of_the_model(attention, ffn):
    config = small(attention, ffn).model
    counts = count(config, 32)
    model = LanguageModel(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.experts == sum(layer.weight.numel() for _, layer in expert_layers(model))
    assert counts.dense + counts.experts == counts.total


def test_active_parameters_by_hand():
    counts = count(small().model, 32)
    idle_heads = 3 * (3 - 2) * (16 * 8 + 8 * 16)
    idle_ffn = (7 - 2) * 3 * 16 * 12
    assert counts.training.active == counts.total - 2 * (idle_heads + idle_ffn)


def test_work_by_hand():
    config = small("moa", "dense").model
    counts = count(config, 32)
    tokens, layers = 32, 4
    assert counts.training == counts.evaluation
    assert counts.training.macs == {
        "projections": layers * tokens * (2 * 16 * 8 + 2 * 16 * 32),
        "experts": layers * tokens * 2 * (16 * 8 + 8 * 16),
        "routers": layers * tokens * 16 * 5,
        "softmax": layers * 2 * tokens * tokens * 2 * 8,
        "head": tokens * 16 * 50,
    }
    work = counts.training
    assert work.block_macs + work.head_macs == work.total_macs == sum(work.macs.values())
    assert counts.flops_per_token == 6 * work.total_macs / tokens
