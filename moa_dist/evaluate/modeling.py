"""Wraps a language model in the interface of transformers, with nothing but torch around it.

`moa-dist export` copies this module, and what it imports, next to the weights (see `remote_code`):
the code that transformers then runs is this one. So it must not import what a reader of an export
does not have. Experts drop nothing, whatever capacity they were trained with: an export's
configuration is that of `dropless`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from moa_dist.config.model import ModelConfig
from moa_dist.models.cache import Cache, KeyValues
from moa_dist.models.language_model import LanguageModel


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

    @property
    def vocab_size(self) -> int:
        """Return how many tokens the model knows; assisted decoding reads it."""
        return int(self.model["vocab_size"])


class MoaDistForCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps a `LanguageModel` in the interface of transformers."""

    config_class = MoaDistConfig
    base_model_prefix = "model"

    def __init__(self, config: MoaDistConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(ModelConfig.model_validate(config.model))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because weights are loaded from a file."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
        tasks: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, S, V] for `input_ids` [B, S] int64.

        `attention_mask` [B, P + S] is 0 at padding, which may be where `LanguageModel` allows it;
        it covers the P tokens that are in the `cache`, too. With `use_cache`, the cache is extended
        and returned. With `labels` [B, S], also computes the mean cross-entropy of each next label;
        labels of -100 are ignored. `tasks` [B] int64 are those of the sequences, for routers that
        have one per task. Other arguments request outputs that these models do not have, and are
        ignored.
        """
        token_mask = None if attention_mask is None else attention_mask.bool()
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is None:
            logits = self.model(input_ids, token_mask, tasks=tasks).logits
        else:
            past = _read_cache(cache, self.model, token_mask)
            new_mask = None if token_mask is None else token_mask[:, past.length :]
            output = self.model(input_ids, new_mask, past, tasks=tasks)
            logits = output.logits
            _extend(cache, past, output.cache)
        loss = None
        if labels is not None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def generate(self, *args: Any, **more: Any) -> Any:
        """Continue texts; raises ValueError if tokens depend on later ones."""
        if reason := self.model.config.looks_ahead:
            raise ValueError(f"{reason}: it cannot continue a text")
        return super().generate(*args, **more)


class _PackedLayer(DynamicLayer):
    """Holds tokens that chose to recur, packed as in `KeyValues`.

    The last column of its keys is 1 in places that hold a token, and 0 in others.
    """

    is_croppable = False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError, because how many places the last tokens take is not known."""
        if tokens_to_remove:
            raise ValueError("tokens choose how often they recur: their cache cannot be cropped")


def _read_cache(cache: DynamicCache, model: LanguageModel, token_mask: Tensor | None) -> Cache:
    """Convert a cache of transformers; `token_mask` [B, P + S] covers its P tokens and others."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{type(cache).__name__} is not supported; use a DynamicCache")
    if not (length := cache.get_seq_length()):
        return model.empty_cache()
    layers = tuple(map(_key_values, cache.layers))
    return Cache(layers, length, None if token_mask is None else token_mask[:, :length])


def _key_values(layer: object) -> KeyValues:
    assert isinstance(layer, DynamicLayer)
    k, v = layer.keys, layer.values
    assert k is not None
    assert v is not None
    if isinstance(layer, _PackedLayer):
        return k[..., :-1], v, k[:, 0, :, -1].bool()
    return k, v


def _extend(cache: DynamicCache, past: Cache, longer: Cache) -> None:
    """Add to a cache of transformers what `longer` has more than `past`."""
    for i, (before, after) in enumerate(zip(past.layers, longer.layers, strict=True)):
        num_past = before[0].shape[2] if before else 0
        k, v = (part[:, :, num_past:] for part in after[:2])
        if len(after) == 3:
            held = after[2][:, None, num_past:, None].expand_as(k[..., :1])
            k = torch.cat([k, held.to(k)], dim=-1)
            if not before:
                cache.layers[i : i + 1] = [_PackedLayer()]
        cache.update(k, v, i)
