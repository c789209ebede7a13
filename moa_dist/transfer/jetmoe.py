"""Maps settings and tensors of JetMoE (Shen et al. 2024, arXiv 2404.07413) in transformers 5.

Its attention is our `moa` with as many heads per expert as it has key heads; its FFN is a softmax
mixture of gated experts; both add a bias to the sum of experts. It uses pre-norm with RMSNorm and
rotates whole heads, in halves as we do. This module only maps; `jetmoe_files` reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from moa_dist.config.attention import MoAConfig
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.routers import RouterConfig
from moa_dist.config.sharing import SharingConfig

BLOCK_NORM_EPS = 1e-6
"""Epsilon of all norms but the last: transformers ignores `rms_norm_eps` for them."""
_ACTIVATIONS = ("relu", "gelu", "silu")


class JetMoeSettings(BaseModel):
    """Holds the fields of JetMoE's `config.json` that determine the function and balance loss.

    The defaults are those of transformers, which omits fields with default values.
    """

    model_config = ConfigDict(extra="ignore")

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 2048
    num_hidden_layers: PositiveInt = 12
    num_key_value_heads: PositiveInt = 16
    kv_channels: PositiveInt = 128
    intermediate_size: PositiveInt = 5632
    max_position_embeddings: PositiveInt = 4096
    activation_function: str = "silu"
    num_local_experts: PositiveInt = 8
    num_experts_per_tok: PositiveInt = 2
    aux_loss_coef: float = 0.01
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    rope_theta: PositiveFloat = 10000.0
    """Base in files from before transformers 5, which have no `rope_parameters`."""
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    attention_dropout: float = 0.0

    @property
    def rope(self) -> dict[str, Any]:
        """Return type and base of the rotary positions."""
        found = self.rope_parameters or self.rope_scaling or {}
        defaults = {"rope_type": found.get("type", "default"), "rope_theta": self.rope_theta}
        return defaults | found


def problems_of_settings(settings: JetMoeSettings) -> Iterator[str]:
    """Yield a line for each setting that our model cannot express."""
    if settings.activation_function not in _ACTIVATIONS:
        yield (
            f"activation_function is {settings.activation_function}; supported are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if settings.rope["rope_type"] != "default":
        yield f"rope_type is {settings.rope['rope_type']}; only default is supported"
    if settings.attention_dropout:
        yield (
            f"attention_dropout is {settings.attention_dropout:g}, which is not supported; "
            "set it to 0 to train without dropout"
        )


def model_config_of(settings: JetMoeSettings) -> dict[str, Any]:
    """Build the `model` section that computes the same as `settings`, which have no problems.

    The balance loss is JetMoE's: the Switch loss with its coefficient, the z-loss with a tenth.
    """
    balance = {"switch": settings.aux_loss_coef, "z_loss": settings.aux_loss_coef / 10}
    router = {
        "num_experts": settings.num_local_experts,
        "top_k": settings.num_experts_per_tok,
        "score": "softmax",
        "gate": "renormalized",
        "balance": balance,
    }
    return {
        "vocab_size": settings.vocab_size,
        "d_model": settings.hidden_size,
        "num_layers": settings.num_hidden_layers,
        "norm_placement": "pre",
        "norm": "rmsnorm",
        "norm_eps": BLOCK_NORM_EPS,
        "final_norm_eps": settings.rms_norm_eps,
        "tie_embeddings": settings.tie_word_embeddings,
        "head_bias": False,
        "attention": {
            "kind": "moa",
            "d_head": settings.kv_channels,
            "heads_per_expert": settings.num_key_value_heads,
            "rope": {"fraction": 1.0, "base": settings.rope["rope_theta"]},
            "output_bias": True,
            "router": router,
        },
        "ffn": {
            "kind": "moe",
            "d_expert": settings.intermediate_size,
            "activation": settings.activation_function,
            "gated": True,
            "output_bias": True,
            "router": router,
        },
    }


def problems_of_model(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each field of our model that JetMoE cannot express."""
    wanted: dict[str, Any] = {
        "objective": "causal",
        "scale_embeddings": False,
        "norm_placement": "pre",
        "norm": "rmsnorm",
        "norm_eps": BLOCK_NORM_EPS,
        "position": "none",
        "logit_soft_cap": None,
        "prelude": 0,
        "coda": 0,
        "halting": None,
        "recursion": None,
    }
    if not config.tie_embeddings:
        wanted["head_bias"] = False
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield f"`model.{name}` is {getattr(config, name)}; JetMoE needs {value}"
    if config.sharing != SharingConfig():
        yield "`model.sharing` shares layers by part; JetMoE needs whole layers in the order ABAB"
    if isinstance(config.attention, MoAConfig):
        rope = config.attention.rope
        if rope is None or rope.fraction != 1 or config.attention.d_head % 2:
            yield "`model.attention.rope` does not rotate whole heads; JetMoE needs fraction 1"
        unlike = {
            "qk_norm": False,
            "window": None,
            "soft_cap": None,
            "shared_experts": 0,
            "kv_bias": False,
            "attend": "softmax",
            "relative_positions": None,
        }
        for name, value in unlike.items():
            if getattr(config.attention, name) != value:
                yield f"`model.attention.{name}` is set, but JetMoE has no such part"
        if rope is not None and rope.scaling is not None:
            yield "`model.attention.rope.scaling` is set, but JetMoE has no such part"
        yield from _router_problems("attention", config.attention.router)
    else:
        yield f"`model.attention.kind` is {config.attention.kind}; JetMoE needs moa"
    if isinstance(config.ffn, MoEFFNConfig):
        if not config.ffn.gated:
            yield "`model.ffn.gated` is false; JetMoE needs gated experts"
        if config.ffn.shared_expert is not None:
            yield "`model.ffn.shared_expert` is set, but JetMoE has no such part"
        yield from _router_problems("ffn", config.ffn.router)
    else:
        yield f"`model.ffn.kind` is {config.ffn.kind}; JetMoE needs moe"
    if isinstance(config.attention, MoAConfig) and isinstance(config.ffn, MoEFFNConfig):
        for name in ("num_experts", "top_k"):
            routers = config.attention.router, config.ffn.router
            in_attention, in_ffn = (getattr(router, name) for router in routers)
            if in_attention != in_ffn:
                yield (
                    f"`model.attention.router.{name}` is {in_attention}, but "
                    f"`model.ffn.router.{name}` is {in_ffn}; JetMoE needs one number for both"
                )


def _router_problems(part: str, router: RouterConfig) -> Iterator[str]:
    path = f"model.{part}.router"
    if router.kind != "topk":
        yield f"`{path}.kind` is {router.kind}; JetMoE needs topk"
    if router.score != "softmax" or router.gate == "raw":
        yield (
            f"`{path}` has score {router.score} and gate {router.gate}; JetMoE needs a softmax "
            "over the chosen experts: softmax and renormalized"
        )
    if router.route_scale != 1 or router.group_limit is not None:
        yield f"`{path}` has a route_scale or a group_limit; JetMoE has neither"
    if router.capacity is not None:
        yield f"`{path}.capacity` drops tokens; JetMoE drops none"
    if router.balance.bias_rate:
        yield f"`{path}.balance.bias_rate` trained a selection bias; JetMoE has none"


def settings_of(config: ModelConfig, *, max_length: int, end_of_document: int) -> dict[str, Any]:
    """Build the content of `config.json` for a model without problems and its context length."""
    attention, ffn = config.attention, config.ffn
    assert isinstance(attention, MoAConfig)
    assert isinstance(ffn, MoEFFNConfig)
    assert attention.rope is not None
    return {
        "architectures": ["JetMoeForCausalLM"],
        "model_type": "jetmoe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.heads_per_expert,
        "kv_channels": attention.d_head,
        "intermediate_size": ffn.d_expert,
        "max_position_embeddings": max_length,
        "activation_function": ffn.activation,
        "num_local_experts": ffn.router.num_experts,
        "num_experts_per_tok": ffn.router.top_k,
        "aux_loss_coef": ffn.router.balance.switch,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.base},
        "rms_norm_eps": config.final_norm_eps or config.norm_eps,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
    }


class Entry(NamedTuple):
    """Maps a tensor of JetMoE to our tensors that hold its values."""

    theirs: str
    """Name in JetMoE."""
    ours: tuple[str, ...]
    """Names of our tensors, stacked along its rows; empty for zeros."""
    transposed: bool = False
    """Whether ours are [..., in, out] and theirs is [..., out, in]."""

    def to_theirs(self, ours: list[Tensor]) -> Tensor:
        """Combine the tensors named in `ours`, at least one, to JetMoE's tensor."""
        parts = [part.mT if self.transposed else part for part in ours]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def to_ours(self, theirs: Tensor) -> list[Tensor]:
        """Split JetMoE's tensor into the tensors named in `ours`."""
        parts = [theirs] if len(self.ours) == 1 else theirs.chunk(len(self.ours), dim=-2)
        return [part.mT if self.transposed else part for part in parts]


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Yield every tensor of the JetMoE that is equivalent to a model of this configuration.

    A shared layer appears once for each time it is applied.
    """
    assert isinstance(config.attention, MoAConfig)
    assert isinstance(config.ffn, MoEFFNConfig)
    yield Entry("model.embed_tokens.weight", ("embedding.weight",))
    num_distinct = config.num_distinct_layers or config.num_layers
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"stack.layers.{i % num_distinct}"
        attention, ffn = f"{ours}.attention", f"{ours}.ffn"
        experts, mlp = f"{theirs}.self_attention.experts", f"{theirs}.mlp"
        bias = (f"{attention}.bias.value",) if config.attention.output_bias else ()
        yield Entry(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
        yield Entry(f"{experts}.router.layer.weight", (f"{attention}.router.logits.weight",))
        yield Entry(f"{experts}.input_linear.weight", (f"{attention}.q.weight",), transposed=True)
        yield Entry(f"{experts}.output_linear.weight", (f"{attention}.o.weight",), transposed=True)
        yield Entry(f"{experts}.bias", bias)
        keys_values = (f"{attention}.k.weight", f"{attention}.v.weight")
        yield Entry(f"{theirs}.self_attention.kv_proj.weight", keys_values)
        bias = (f"{ffn}.bias.value",) if config.ffn.output_bias else ()
        up_gate = (f"{ffn}.up.weight", f"{ffn}.gate.weight")
        yield Entry(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.ffn_norm.weight",))
        yield Entry(f"{mlp}.router.layer.weight", (f"{ffn}.router.logits.weight",))
        yield Entry(f"{mlp}.input_linear.weight", up_gate, transposed=True)
        yield Entry(f"{mlp}.output_linear.weight", (f"{ffn}.down.weight",), transposed=True)
        yield Entry(f"{mlp}.bias", bias)
    yield Entry("model.norm.weight", ("final_norm.weight",))
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("head.weight",))
