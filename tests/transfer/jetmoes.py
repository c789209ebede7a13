"""Tiny JetMoEs of transformers, every parameter random."""

from pathlib import Path
from typing import Any

import torch
from transformers import JetMoeConfig, JetMoeForCausalLM

from tests.transfer.runs import LENGTH, VOCABULARY, randomize, save_tokenizer

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 3,
    "kv_channels": 6,
    "intermediate_size": 10,
    "max_position_embeddings": LENGTH,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


def make_jetmoe(folder: Path, max_shard_size: str = "5GB", **settings: Any) -> JetMoeForCausalLM:
    """Saved in `folder`, with a tokenizer."""
    model = JetMoeForCausalLM(JetMoeConfig(**SETTINGS | settings)).eval()
    randomize(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and which are real: the second sequence ends in padding, the third begins with it."""
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    real[1, 7:] = False
    real[2, :5] = False
    return tokens, real
