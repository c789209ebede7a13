"""JetMoE (Shen et al. 2024, arXiv 2404.07413) as transformers 5 knows it: settings and tensors.

Its attention is our `moa` with as many heads per expert as it has key heads, its FFN a softmax
mixture of gated experts; both add a bias to the sum of experts. Pre-norm with RMSNorm, rotary
positions on whole heads, in halves as ours. Pure translation: `jetmoe_files` reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from moa_dist.config.model import MoAConfig, ModelConfig, MoEFFNConfig, RouterConfig

BLOCK_NORM_EPS = 1e-6
"""Of all norms but the last: transformers builds them so, whatever `rms_norm_eps` says."""
_ACTIVATIONS = ("relu", "gelu", "silu")


class JetMoeSettings(BaseModel):
    """What of its `config.json` decides the function of the model, and its balance loss.

    Defaults are those of transformers, which leaves out what equals them.
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
    """Of files before transformers 5, which have no `rope_parameters`."""
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    attention_dropout: float = 0.0

    @property
    def rope(self) -> dict[str, Any]:
        """Type and base of the rotary positions."""
        found = self.rope_parameters or self.rope_scaling or {}
        defaults = {"rope_type": found.get("type", "default"), "rope_theta": self.rope_theta}
        return defaults | found


def problems_of_settings(settings: JetMoeSettings) -> Iterator[str]:
    """Why our model would not compute what these settings say, a line each."""
    if settings.activation_function not in _ACTIVATIONS:
        yield (
            f"activation_function is {settings.activation_function}; known are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if settings.rope["rope_type"] != "default":
        yield f"rope_type is {settings.rope['rope_type']}; only the default is known"
    if settings.attention_dropout:
        yield (
            f"attention_dropout is {settings.attention_dropout:g}, which does not exist here; "
            "set it to 0 to train without"
        )


def model_config_of(settings: JetMoeSettings) -> dict[str, Any]:
    """The `model` section that computes the same; of settings without problems.

    Balance is JetMoE's: the Switch loss by its coefficient, and a tenth of that for the z-loss.
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
    """Why JetMoE would not compute what this model does, a line each."""
    wanted: dict[str, Any] = {
        "objective": "causal",
        "scale_embeddings": False,
        "norm_placement": "pre",
        "norm": "rmsnorm",
        "norm_eps": BLOCK_NORM_EPS,
        "position": "none",
    }
    if not config.tie_embeddings:
        wanted["head_bias"] = False
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield f"`model.{name}` is {getattr(config, name)}; JetMoE has {value}"
    if isinstance(config.attention, MoAConfig):
        rope = config.attention.rope
        if rope is None or rope.fraction != 1 or config.attention.d_head % 2:
            yield "`model.attention.rope` leaves dimensions as they are; JetMoE rotates whole heads"
        yield from _router_problems("attention", config.attention.router)
    else:
        yield f"`model.attention.kind` is {config.attention.kind}; JetMoE has moa"
    if isinstance(config.ffn, MoEFFNConfig):
        if not config.ffn.gated:
            yield "`model.ffn.gated` is false; JetMoE has gated experts"
        yield from _router_problems("ffn", config.ffn.router)
    else:
        yield f"`model.ffn.kind` is {config.ffn.kind}; JetMoE has moe"
    if isinstance(config.attention, MoAConfig) and isinstance(config.ffn, MoEFFNConfig):
        for name in ("num_experts", "top_k"):
            here, there = (getattr(r, name) for r in (config.attention.router, config.ffn.router))
            if here != there:
                yield (
                    f"`{name}` is {here} in `model.attention.router` and {there} in "
                    "`model.ffn.router`; JetMoE has one number for both"
                )


def _router_problems(part: str, router: RouterConfig) -> Iterator[str]:
    path = f"model.{part}.router"
    if router.score != "softmax" or router.gate == "raw":
        yield (
            f"`{path}` weighs experts by {router.score}, {router.gate}; JetMoE by a softmax over "
            "those chosen: softmax, renormalized"
        )
    if router.capacity is not None:
        yield f"`{path}.capacity` drops tokens; JetMoE drops none"
    if router.balance.bias_rate:
        yield f"`{path}.balance.bias_rate` has made a bias; JetMoE chooses without one"


def settings_of(config: ModelConfig, *, max_length: int, end_of_document: int) -> dict[str, Any]:
    """Contents of `config.json`; of a model without problems, trained on `max_length` tokens."""
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
    """A tensor of JetMoE, and those of ours whose values it holds."""

    theirs: str
    """Name in JetMoE."""
    ours: tuple[str, ...]
    """Names here, one above the other over its rows; none for zeros."""
    mirrored: bool = False
    """Ours are [..., in, out], theirs [..., out, in]."""

    def to_theirs(self, ours: list[Tensor]) -> Tensor:
        """From the tensors named in `ours`, of which there is at least one."""
        parts = [part.mT if self.mirrored else part for part in ours]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def to_ours(self, theirs: Tensor) -> list[Tensor]:
        """The tensors named in `ours`."""
        parts = [theirs] if len(self.ours) == 1 else theirs.chunk(len(self.ours), dim=-2)
        return [part.mT if self.mirrored else part for part in parts]


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the JetMoE that equals a model of this configuration.

    Layers that are shared here are written as often as they are applied.
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
        yield Entry(f"{experts}.input_linear.weight", (f"{attention}.q.weight",), mirrored=True)
        yield Entry(f"{experts}.output_linear.weight", (f"{attention}.o.weight",), mirrored=True)
        yield Entry(f"{experts}.bias", bias)
        keys_values = (f"{attention}.k.weight", f"{attention}.v.weight")
        yield Entry(f"{theirs}.self_attention.kv_proj.weight", keys_values)
        bias = (f"{ffn}.bias.value",) if config.ffn.output_bias else ()
        up_gate = (f"{ffn}.up.weight", f"{ffn}.gate.weight")
        yield Entry(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.ffn_norm.weight",))
        yield Entry(f"{mlp}.router.layer.weight", (f"{ffn}.router.logits.weight",))
        yield Entry(f"{mlp}.input_linear.weight", up_gate, mirrored=True)
        yield Entry(f"{mlp}.output_linear.weight", (f"{ffn}.down.weight",), mirrored=True)
        yield Entry(f"{mlp}.bias", bias)
    yield Entry("model.norm.weight", ("final_norm.weight",))
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("head.weight",))
