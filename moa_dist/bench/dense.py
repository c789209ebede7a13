"""Dense models to compare with: of equal work, or of equal parameters.

Equal work excludes routers, so that their cost becomes visible.
"""

from __future__ import annotations

from moa_dist.config.attention import AttentionConfig, DenseAttentionConfig
from moa_dist.config.feed_forward import DenseFFNConfig, FFNConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.sharing import SharingConfig
from moa_dist.models.counts import count
from moa_dist.models.kinds import make_attention, make_feed_forward

_D_HEAD = 64


def equal_work(model: ModelConfig, length: int) -> ModelConfig:
    """Return dense attention and FFN with as many multiply-accumulates per layer as `model`'s."""
    return model.model_copy(
        update={
            "attention": _attention_of_equal_work(model, length),
            "ffn": _ffn_of_equal_work(model),
        }
    )


def _attention_of_equal_work(model: ModelConfig, length: int) -> AttentionConfig:
    if not model.attention.routers:
        return model.attention
    macs = make_attention(model.attention, model.d_model, 1.0).macs(length, training=True)
    work = sum(macs.values()) - macs["routers"]
    width = work / (4 * length * model.d_model + 2 * length**2)
    num_heads = max(1, round(width / _D_HEAD))
    return DenseAttentionConfig(
        num_heads=num_heads, d_head=round(width / num_heads / 2) * 2, rope=model.attention.rope
    )


def _ffn_of_equal_work(model: ModelConfig) -> FFNConfig:
    ffn = model.ffn
    if not ffn.routers:
        return ffn
    macs = make_feed_forward(ffn, model.d_model, 1.0).macs(1, training=True)
    num_matrices = 3 if ffn.gated else 2
    return DenseFFNConfig(
        d_ff=(sum(macs.values()) - macs["routers"]) // (num_matrices * model.d_model),
        activation=ffn.activation,
        gated=ffn.gated,
    )


def equal_parameters(model: ModelConfig, length: int) -> ModelConfig:
    """Return a pre-norm model without experts or sharing, of the same depth, width and parameters.

    This is how the papers match their baselines: all heads together are as wide as the model, and
    the FFN takes the remaining parameters.
    """
    num_heads = max(1, round(model.d_model / _D_HEAD))
    attention = DenseAttentionConfig(
        num_heads=num_heads, d_head=model.d_model // num_heads // 2 * 2
    )

    def dense(d_ff: int) -> ModelConfig:
        return model.model_copy(
            update={
                "num_distinct_layers": None,
                "sharing": SharingConfig(),
                "prelude_ffn": None,
                "halting": None,
                "recursion": None,
                "norm_placement": "pre",
                "attention": attention,
                "ffn": DenseFFNConfig(d_ff=d_ff),
            }
        )

    base, step = (count(dense(d_ff), length).total for d_ff in (1, 2))
    wanted = count(model, length).total
    return dense(max(1, 1 + round((wanted - base) / (step - base))))
