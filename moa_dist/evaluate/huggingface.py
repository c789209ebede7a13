"""Adapts trained models to Hugging Face transformers, an optional dependency.

`from_export` wraps an export of `moa-dist export`. Once this module is imported, `generate`,
`save_pretrained`, `from_pretrained` and `AutoModelForCausalLM` work as for any other model. As in
`moa-dist generate`, experts drop nothing, whatever capacity they were trained with.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        DynamicCache,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.cache_utils import DynamicLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "transformers is not installed: pip install 'moa-dist[huggingface]'"
    ) from error

from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.export import MODEL_FILE, is_export, load_export
from moa_dist.models.cache import Cache
from moa_dist.models.language_model import LanguageModel, dropless


class MoaDistConfig(PretrainedConfig):
    """Holds the `model` section of a run's configuration."""

    model_type = "moa_dist"
    has_no_defaults_at_init = True

    def __init__(self, model: dict[str, Any], **more: Any) -> None:
        self.model = model
        super().__init__(**more)

    @property
    def num_hidden_layers(self) -> int:
        """Return how many layers have keys and values to cache, repeats included."""
        return int(self.model["num_layers"])


class MoaDistForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a `LanguageModel` in the interface of transformers."""

    config_class = MoaDistConfig
    base_model_prefix = "model"

    def __init__(self, config: MoaDistConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(ModelConfig.model_validate(config.model))
        self.tokenizer: PreTrainedTokenizerFast | None = None
        """What `save_pretrained` saves with the model; known after `from_export`."""
        self.post_init()

    @classmethod
    def from_export(cls, folder: str | Path) -> MoaDistForCausalLM:
        """Load an export of `moa-dist export` in fp32 and evaluation mode.

        Raises DataError if the model is not causal or was trained with `data.document_attention`,
        and what `load_export` raises.
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
        if config.data.document_attention:
            raise DataError(
                f"{folder}: trained with data.document_attention, but a cache of transformers does "
                "not hold the documents of tokens; use `moa-dist generate`",
                path=Path(folder),
                key="data.document_attention",
            )
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
                )
            )
        result.model = model
        result.tokenizer = _wrap_tokenizer(tokenizer, config.data.sequence_length)
        return result.eval()

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **more: Any) -> None:
        """Save the model and, after `from_export`, the tokenizer, for `AutoTokenizer`."""
        super().save_pretrained(save_directory, *args, **more)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because weights are loaded from a file."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, S, V] for `input_ids` [B, S] int64.

        `attention_mask` [B, P + S] is 0 at padding, which may be anywhere; it covers the P tokens
        that are in the `cache`, too. With `use_cache`, the cache is extended and returned. With
        `labels` [B, S], also computes the mean cross-entropy of each next label; labels of -100
        are ignored. Other arguments request outputs that these models do not have, and are ignored.
        """
        token_mask = None if attention_mask is None else attention_mask.bool()
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is None:
            logits = self.model(input_ids, token_mask).logits
        else:
            past = _read_cache(cache, self.model, token_mask)
            new_mask = None if token_mask is None else token_mask[:, past.length :]
            output = self.model(input_ids, new_mask, past)
            logits = output.logits
            for i, (k, v) in enumerate(output.cache.layers):
                cache.update(k[:, :, past.length :], v[:, :, past.length :], i)
        loss = None
        if labels is not None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)


def _read_cache(cache: DynamicCache, model: LanguageModel, token_mask: Tensor | None) -> Cache:
    """Convert a cache of transformers; `token_mask` [B, P + S] covers its P tokens and others."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{type(cache).__name__} is not supported; use a DynamicCache")
    if not (length := cache.get_seq_length()):
        return model.empty_cache()
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layers.append((layer.keys, layer.values))
    return Cache(tuple(layers), length, None if token_mask is None else token_mask[:, :length])


def _wrap_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer; text that spells a special token stays ordinary text, as in training."""
    end = tokenizer.end_token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",  # to generate from several prompts
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


AutoConfig.register(MoaDistConfig.model_type, MoaDistConfig)
AutoModelForCausalLM.register(MoaDistConfig, MoaDistForCausalLM)
