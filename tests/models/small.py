"""Small models of every kind, in fp64."""

from typing import Any

import torch
from torch import Tensor

from moa_dist.config.model import ModelConfig
from moa_dist.config.recompute import Recompute
from moa_dist.models.language_model import LanguageModel, build_model

VOCABULARY, LENGTH = 19, 8


def router(num_experts: int, top_k: int, score: str = "sigmoid", **more: Any) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, "score": score, **more}


ATTENTION = {
    "dense": {"kind": "dense", "num_heads": 2, "d_head": 4},
    "moa": {"kind": "moa", "d_head": 4, "heads_per_expert": 2, "router": router(3, 2, "softmax")},
    "switchhead": {"kind": "switchhead", "num_heads": 2, "d_head": 4, "router": router(3, 2)},
}
FFN = {
    "dense": {"kind": "dense", "d_ff": 12},
    "dense gated": {"kind": "dense", "d_ff": 12, "gated": True, "activation": "silu"},
    "moe": {"kind": "moe", "d_expert": 4, "router": router(4, 2)},
    "moe gated": {
        "kind": "moe",
        "d_expert": 4,
        "gated": True,
        "activation": "gelu",
        "router": router(4, 2, "softmax", gate="renormalized_detached"),
    },
}
PLACEMENTS = ["pre", "post", "peri"]


def with_capacity(policy: str) -> dict[str, Any]:
    """Sections of MoA and MoE layers that drop some assignments."""
    capacity = {"factor": 0.7, "policy": policy}
    return {
        "attention": ATTENTION["moa"] | {"router": router(3, 2, "softmax", capacity=capacity)},
        "ffn": FFN["moe"] | {"router": router(4, 2, capacity=capacity)},
    }


def small_config(
    attention: str | dict[str, Any] = "dense", ffn: str | dict[str, Any] = "moe", **more: Any
) -> ModelConfig:
    """Kinds by name or as sections; `more` are other fields of the model."""
    fields = {
        "vocab_size": VOCABULARY,
        "d_model": 8,
        "num_layers": 2,
        "attention": ATTENTION[attention] if isinstance(attention, str) else attention,
        "ffn": FFN[ffn] if isinstance(ffn, str) else ffn,
    }
    return ModelConfig.model_validate(fields | more)


def small_model(*, recompute: Recompute = False, **fields: Any) -> LanguageModel:
    """Of `small_config(**fields)`."""
    return build_model(small_config(**fields), recompute=recompute).double()


def tokens_of(num_sequences: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (num_sequences, length), generator=generator)
