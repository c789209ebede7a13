"""Writes what makes an export a model of transformers: settings in JSON, and the code to run.

transformers itself is not needed here. Then, wherever torch and transformers are installed:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moa_dist.checkpoint.tensor_file import write_file
from moa_dist.config.run import Config
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.evaluate.remote_code import ROOT, flat_name, write_code
from moa_dist.models.language_model import dropless, meta_model

SETTINGS_FILE = "config.json"
MODEL_TYPE, MODEL_CLASS = "moa_dist", "MoaDistForCausalLM"
AUTO_MAP = {
    "AutoConfig": f"{flat_name(ROOT)}.MoaDistConfig",
    "AutoModelForCausalLM": f"{flat_name(ROOT)}.{MODEL_CLASS}",
}
"""Which classes of the code transformers uses."""


def is_for_transformers(folder: Path) -> bool:
    """Return whether transformers can load this export."""
    return (folder / SETTINGS_FILE).is_file()


def unsupported(config: Config) -> tuple[str, str] | None:
    """Say what keeps a run's model from transformers: a field, and why; None if nothing does."""
    if config.model.objective != "causal":
        reason = f"trained with model.objective {config.model.objective}; only causal models fit"
        return "model.objective", reason
    if config.data.document_attention:
        return "data.document_attention", (
            "trained with data.document_attention, but a cache of transformers does not hold the "
            "documents of tokens; use `moa-dist generate`"
        )
    return None


def write_transformers_files(
    folder: Path, config: Config, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Write all files but the weights; `dtype` is their type. `config` must be supported."""
    model = dropless(meta_model(config.model))
    ends = {f"{name}_token_id": tokenizer.end_of_document for name in ("bos", "eos", "pad")}
    settings = {
        "architectures": [MODEL_CLASS],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "model": model.config.model_dump(mode="json"),
        **ends,
    }
    _write_json(folder / SETTINGS_FILE, settings)
    _write_json(folder / "generation_config.json", ends)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokenizer_settings(tokenizer, config.data.sequence_length),
        },
    )
    write_code(folder, model)


def tokenizer_settings(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Return arguments of transformers' `PreTrainedTokenizerFast`.

    Text that spells a special token stays ordinary text, as in training.
    """
    end = tokenizer.end_token
    return {
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # to generate from several prompts
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, [json.dumps(content, indent=2).encode() + b"\n"])
