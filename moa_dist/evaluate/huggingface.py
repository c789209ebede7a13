"""Adapts trained models to Hugging Face transformers, an optional dependency.

`moa-dist export` writes a folder that transformers loads without this package. Where the package is
installed, `from_export` wraps an export, and once this module is imported, `AutoModelForCausalLM`
loads such folders without `trust_remote_code`. As in `moa-dist generate`, experts drop nothing,
whatever capacity they were trained with.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(
        "transformers is not installed: pip install 'moa-dist[huggingface]'"
    ) from error

from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate import modeling
from moa_dist.evaluate.export import MODEL_FILE, is_export, load_export
from moa_dist.evaluate.modeling import MoaDistConfig
from moa_dist.evaluate.remote_code import write_code
from moa_dist.evaluate.transformers_files import AUTO_MAP, tokenizer_settings, unsupported
from moa_dist.models.language_model import dropless


class MoaDistForCausalLM(modeling.MoaDistForCausalLM):
    """Wraps a `LanguageModel`, or an export of one, in the interface of transformers."""

    def __init__(self, config: MoaDistConfig) -> None:
        super().__init__(config)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        """What `save_pretrained` saves with the model; known after `from_export`."""

    @classmethod
    def from_export(cls, folder: str | Path) -> MoaDistForCausalLM:
        """Load an export of `moa-dist export` in fp32 and evaluation mode.

        Raises DataError if the model is one that transformers cannot run, and what `load_export`
        raises.
        """
        if not is_export(Path(folder)):
            raise DataError(
                f"{folder}: no {MODEL_FILE}; give a folder that `moa-dist export` wrote",
                path=Path(folder),
            )
        model, config, _ = load_export(Path(folder))
        if obstacle := unsupported(config):
            key, reason = obstacle
            raise DataError(f"{folder}: {reason}", path=Path(folder), key=key)
        tokenizer = load_tokenizer(Path(folder) / TOKENIZER_FILE)
        end = tokenizer.end_of_document
        model = dropless(model)
        with torch.device("meta"):
            result = cls(
                MoaDistConfig(
                    model.config.model_dump(mode="json"),
                    bos_token_id=end,
                    eos_token_id=end,
                    pad_token_id=end,
                    auto_map=dict(AUTO_MAP),
                )
            )
        result.model = model
        result.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend,
            **tokenizer_settings(tokenizer, config.data.sequence_length),
        )
        return result.eval()

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **more: Any) -> None:
        """Save the model, its code and, after `from_export`, the tokenizer."""
        super().save_pretrained(save_directory, *args, **more)
        write_code(Path(save_directory), self.model)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)


AutoConfig.register(MoaDistConfig.model_type, MoaDistConfig)
AutoModelForCausalLM.register(MoaDistConfig, MoaDistForCausalLM)
