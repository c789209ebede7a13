"""Adapts trained models to Hugging Face transformers, an optional dependency.

`from_export` wraps an export of `moa-dist export`. Once this module is imported, `generate`,
`save_pretrained`, `from_pretrained` and `AutoModelForCausalLM` work as for any other model. This
`generate` uses no cache and reads the whole text again for every token; use
`moa_dist.evaluate.generate` to generate with a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutput
except ImportError as error:
    raise ImportError(
        "transformers is not installed: pip install 'moa-dist[huggingface]'"
    ) from error

from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.export import MODEL_FILE, is_export, load_export
from moa_dist.models.language_model import LanguageModel


class MoaDistConfig(PretrainedConfig):
    """Holds the `model` section of a run's configuration."""

    model_type = "moa_dist"
    has_no_defaults_at_init = True

    def __init__(self, model: dict[str, Any], **more: Any) -> None:
        self.model = model
        super().__init__(**more)


class MoaDistForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a `LanguageModel` in the interface of transformers."""

    config_class = MoaDistConfig
    base_model_prefix = "model"

    def __init__(self, config: MoaDistConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(ModelConfig.model_validate(config.model))
        self.post_init()
        self.generation_config.use_cache = False  # the cache types are incompatible

    @classmethod
    def from_export(cls, folder: str | Path) -> MoaDistForCausalLM:
        """Load an export of `moa-dist export` in fp32 and evaluation mode.

        Raises DataError if the model is not causal, and what `load_export` raises.
        """
        if not is_export(Path(folder)):
            raise DataError(
                f"{folder}: no {MODEL_FILE}; give a folder that `moa-dist export` wrote",
                path=Path(folder),
            )
        model, config, _ = load_export(Path(folder))
        if config.model.objective != "causal":
            raise DataError(
                f"{folder}: trained with model.objective {config.model.objective}; only causal "
                "models can be wrapped",
                path=Path(folder),
                key="model.objective",
            )
        end = load_tokenizer(Path(folder) / TOKENIZER_FILE).end_of_document
        with torch.device("meta"):
            result = cls(
                MoaDistConfig(
                    config.model.model_dump(mode="json"),
                    bos_token_id=end,
                    eos_token_id=end,
                    pad_token_id=end,
                )
            )
        result.model = model
        return result.eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because weights are loaded from a file."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Compute logits [B, S, V] for `input_ids` [B, S] int64.

        `attention_mask` [B, S] is 0 at padding, which may be anywhere. With `labels` [B, S], also
        computes the mean cross-entropy of each next label; labels of -100 are ignored. Other
        arguments request outputs that these models do not have, and are ignored.
        """
        token_mask = None if attention_mask is None else attention_mask.bool()
        logits = self.model(input_ids, token_mask).logits
        loss = None
        if labels is not None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(MoaDistConfig.model_type, MoaDistConfig)
AutoModelForCausalLM.register(MoaDistConfig, MoaDistForCausalLM)
