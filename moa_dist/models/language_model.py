"""The language model: embedding, stack, head and auxiliary losses; an encoder for translation.

Shapes: B sequences of S tokens, R tokens of a source text, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.config.recompute import Recompute
from moa_dist.kernels.gradient_sum import GradientSums, Repeats
from moa_dist.models.aux_losses import SumOverRanks, aux_losses, on_one_process
from moa_dist.models.block import EncoderMemory, make_norm
from moa_dist.models.cache import Cache
from moa_dist.models.calls import LayerCall, RouterCall, RouterKey
from moa_dist.models.documents import Documents
from moa_dist.models.embedding import TokenEmbedding
from moa_dist.models.linear import Linear
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.padding import Runs, runs_of
from moa_dist.models.positions import positions, sinusoidal_positions
from moa_dist.models.rope import Rotation
from moa_dist.models.soft_cap import soft_capped
from moa_dist.models.stack import LayerStack, StackOutput
from moa_dist.models.stack_counts import macs_of
from moa_dist.models.state import LayerState
from moa_dist.models.trace import BlockTrace
from moa_dist.moe.initialize import Normal, initialize
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingStatistics


class LanguageModelOutput(NamedTuple):
    """All results of a forward; modules keep none of them."""

    logits: Tensor
    """[B, S, V]."""
    aux_losses: dict[str, Tensor]
    """Scalar losses by name, such as `ffn/entropy`: coefficients applied, summed over distinct
    layers. Training adds them all to the cross-entropy."""
    statistics: dict[RouterCall, RoutingStatistics]
    """One entry per router application."""
    cache: Cache | None = None
    """The cache extended by the tokens of this forward; None if it was given none."""
    traces: dict[LayerCall, BlockTrace] | None = None
    """What every application of a layer decided; None unless traces were requested."""
    token_sums: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """[2] by name, such as `halting/applications`: a sum over real tokens, and their number."""


class LanguageModel(nn.Module):
    """A language model of any objective, attention, FFN, stack and norm placement.

    `stack` is the encoder of a masked language model, else the decoder. A model that translates has
    an `encoder` before it.
    """

    def __init__(self, config: ModelConfig, *, recompute: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.sum_over_ranks: SumOverRanks = on_one_process
        """Used in training by `BalanceConfig.scope` global_batch."""
        translates = config.objective == "translation"
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = LayerStack(config, recompute=recompute) if translates else None
        self.encoder_norm = _final_norm(config) if translates else None
        self.stack = LayerStack(config, recompute=recompute, cross=translates)
        self.final_norm = _final_norm(config)
        init = Normal(1 / math.sqrt(config.d_model))
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.d_model, config.vocab_size, init, bias=config.head_bias)
        )

    def compile_blocks(self, **options: Any) -> None:
        """Compile all blocks for training, see `LayerStack.compile_blocks`."""
        for stack in (self.encoder, self.stack):
            if stack is not None:
                stack.compile_blocks(**options)

    def empty_cache(self) -> Cache:
        """Return a cache without tokens, for the first of several forwards over one text."""
        return Cache(layers=((),) * self.config.num_layers)

    def routers(self) -> dict[RouterKey, Router]:
        """All routers, those of an encoder first."""
        encoder = {} if self.encoder is None else self.encoder.routers()
        return encoder | self.stack.routers()

    def forward(
        self,
        tokens: Tensor,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        documents: Documents | None = None,
        tasks: Tensor | None = None,
        *,
        trace: bool = False,
    ) -> LanguageModelOutput:
        """Compute logits at every position: of the next token, or of the token itself if masked.

        Args:
            tokens: [B, S] int64.
            token_mask: [B, S] bool, false at padding; None without padding. The position of a token
                is the number of real tokens before it. Padding may be in front of the text and
                behind it; without a cache, flash attention on GPUs expects none within it.
            cache: tokens that precede `tokens`. Logits equal those of one forward over all of them;
                there are no auxiliary losses.
            source: [B, R] int64, the text to translate, unless the cache holds it.
            source_mask: [B, R] bool, like `token_mask`.
            documents: those of the tokens in the cache and of `tokens`, [B, num_past + S]: a token
                sees its own document only, where positions start anew. None if it sees all.
            tasks: [B] int64, the task of each sequence, for routers that have one per task.
            trace: whether to return what every layer decided.

        Raises:
            ValueError: a cache is used and experts have a capacity (see `dropless`), or are chosen
                by later tokens, or a cache, a source or documents do not fit the objective or the
                tokens.
            DataError: a router needs `tasks`, which are not given.
        """
        self._check_source(source, cache)
        num_past, key_mask = 0, token_mask
        if cache is not None:
            self._check_cache()
            num_past, key_mask = cache.length, cache.mask_with(tokens, token_mask)
        if documents is not None:
            self._check_documents(documents, tokens, num_past)
        position = positions(tokens, key_mask, num_past, documents)
        table = self._uses_of_table()
        x, memory, encoded = self._embed(tokens, position, table), None, None
        if self.encoder is not None:
            if source is not None:
                encoded = self._encode(source, source_mask, table, trace)
                x_source = encoded.x
            elif cache is None or not cache.length:
                raise ValueError("a model that translates needs a source")
            else:  # its keys and values are in the cache
                x_source, source_mask = x[:, :0], cache.source_mask
            runs = self._runs(x, None if source is None else source_mask, causal=False)
            memory = EncoderMemory(x_source, token_mask, source_mask, runs)
        causal = self.config.objective != "masked"
        apart = documents is not None or num_past > 0
        runs = self._runs(x, None if apart else key_mask, causal=causal)
        mask = AttentionMask(causal, token_mask, key_mask, num_past, None, documents, runs=runs)
        masks = self._layer_masks(mask, position, x.dtype)
        layers = None if cache is None else cache.layers
        output = self.stack(x, masks, layers, memory, trace, LayerState(tasks=tasks))
        statistics, traces = output.statistics, output.traces
        losses = self.stack.losses(output, token_mask)
        sums = output.token_sums
        if encoded is not None:
            assert self.encoder is not None
            statistics = encoded.statistics | statistics
            of_encoder = self.encoder.losses(encoded, source_mask)
            losses = {name: loss + of_encoder[name] for name, loss in losses.items()}
            sums = sums | {f"encoder/{name}": both for name, both in encoded.token_sums.items()}
            traces = None if traces is None else (encoded.traces or {}) | traces
        logits = self._logits(output.x, table)
        if output.cache is None:
            # Ranks may validate unequal numbers of batches, and use no loss then.
            sum_over_ranks = self.sum_over_ranks if self.training else on_one_process
            losses = aux_losses(statistics, self.routers(), sum_over_ranks) | losses
            return LanguageModelOutput(logits, losses, statistics, None, traces, sums)
        longer = Cache(output.cache, num_past + tokens.shape[1], key_mask, source_mask)
        return LanguageModelOutput(logits, {}, statistics, longer, traces, sums)

    def _check_source(self, source: Tensor | None, cache: Cache | None) -> None:
        if source is not None and self.encoder is None:
            raise ValueError("only a model that translates has a source")
        if source is not None and cache is not None and cache.length:
            raise ValueError("the cache holds a source already")

    def _check_cache(self) -> None:
        if reason := self.config.looks_ahead:
            raise ValueError(f"{reason}: it cannot use a cache")
        if self.config.objective == "masked":
            raise ValueError("a masked language model sees both sides: it cannot use a cache")
        routers = self.config.routers().values()
        if any(router.capacity for router in routers):
            raise ValueError(
                "with a capacity, what an expert drops depends on the whole sequence, which a "
                "cache does not hold; use dropless(model)"
            )
        if self.training and any(router.sees_group_in_training for router in routers):
            raise ValueError("training chooses experts by later tokens too: use model.eval()")

    def _check_documents(self, documents: Documents, tokens: Tensor, num_past: int) -> None:
        if self.config.recursion is not None:
            raise ValueError("tokens that choose their number of recursions cannot have documents")
        if self.encoder is not None:
            raise ValueError(
                "a model that translates reads each text by itself: it has no documents"
            )
        expected = len(tokens), num_past + tokens.shape[1]
        if documents.ids.shape != expected:
            raise ValueError(
                f"documents of {tuple(documents.ids.shape)} tokens were given, but the model has "
                f"read {expected}, cache included"
            )

    def _uses_of_table(self) -> Repeats:
        """Return what sums the gradients of the embedding over lookups and, if tied, the head."""
        (table,) = self.embedding.parameters()  # ZeRO 3 would gather what is read as an attribute
        num_lookups = 1 if self.encoder is None else 2
        return GradientSums({table: num_lookups + (self.head is None)}).of({table: table})

    def _embed(self, tokens: Tensor, position: Tensor, table: Repeats) -> Tensor:
        """[B, S] -> [B, S, D]."""
        with table.summing():
            x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.d_model)
        if self.config.position == "sinusoidal":
            x = x + sinusoidal_positions(position, x.shape[2], x.dtype)
        return self.dropout(x)

    def _logits(self, x: Tensor, table: Repeats) -> Tensor:
        """[B, S, D] -> [B, S, V]."""
        x = self.final_norm(x)
        with table.summing():
            logits: Tensor = self.embedding(x) if self.head is None else self.head(x)
        cap = self.config.logit_soft_cap
        return logits if cap is None else soft_capped(logits, cap)

    def _layer_masks(self, mask: AttentionMask, position: Tensor, dtype: torch.dtype) -> LayerMasks:
        """Compute once what all layers see, and by what they rotate at `position` [B or 1, S]."""
        attention = self.config.attention

        def rotation(rope: RopeConfig | None) -> Rotation | None:
            return None if rope is None else Rotation.at(position, attention.d_head, rope, dtype)

        full = mask._replace(rotation=rotation(attention.rope))
        if (window := attention.window) is None:
            return LayerMasks(full, full)
        local = full._replace(window=window.size)
        if window.rope is not None:
            local = local._replace(rotation=rotation(window.rope))
        return LayerMasks(full, local, window)

    def _runs(self, queries: Tensor, key_mask: Tensor | None, *, causal: bool) -> Runs | None:
        """Find once for all layers what `queries` [B, T, D] attend to, if flash attention runs."""
        return runs_of(queries, key_mask, self.config.attention.d_head, causal=causal)

    def _encode(
        self, source: Tensor, token_mask: Tensor | None, table: Repeats, trace: bool
    ) -> StackOutput:
        assert self.encoder is not None
        assert self.encoder_norm is not None
        position = positions(source, token_mask)
        x = self._embed(source, position, table)
        runs = self._runs(x, token_mask, causal=False)
        mask = AttentionMask(False, token_mask, token_mask, runs=runs)
        output = self.encoder(x, self._layer_masks(mask, position, x.dtype), trace=trace)
        return output._replace(x=self.encoder_norm(output.x))

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Count multiply-accumulates of one forward over a sequence of `length`, by part.

        For translation, source and target both have that length. See `Attention.macs`.
        """
        head = length * self.config.d_model * self.config.vocab_size
        of_layers = sum(macs_of(self, length, training=training).values(), Counter[str]())
        return {**of_layers, "head": head}


def _final_norm(config: ModelConfig) -> nn.Module:
    """Build the norm before the head; post-norm blocks leave a normalized residual already."""
    if config.norm_placement == "post":
        return nn.Identity()
    return make_norm(config, config.final_norm_eps or config.norm_eps)


def build_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    recompute: Recompute = False,
    parallelize: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """Build a model with initial weights, in fp32 on the CPU, that runs on one process."""
    return materialize(meta_model(config, recompute=recompute), seed, parallelize)


def meta_model(config: ModelConfig, *, recompute: Recompute = False) -> LanguageModel:
    """Build a model on the meta device: all shapes, and no memory for parameters."""
    with torch.device("meta"):
        return LanguageModel(config, recompute=recompute)


def materialize(
    model: LanguageModel, seed: int, parallelize: Callable[[nn.Module], None] | None = None
) -> LanguageModel:
    """Give a model of the meta device initial weights, in fp32 on the CPU; returns that model.

    `parallelize` is called while parameters are on the meta device, so what it removes is never
    allocated. Initial weights depend on the seed alone, not on `parallelize`.
    """
    if parallelize is not None:
        parallelize(model)
    model.to_empty(device="cpu")
    initialize(model, seed)
    return model


def dropless(model: LanguageModel) -> LanguageModel:
    """Return a model with the same weights but without capacity limits or groups of sequences.

    Capacity is relative to the length of a whole sequence, which is unknown during generation. The
    model must be whole, on one process: parallelism is not carried over.
    """
    parts = {
        name: part.with_routers(capacity=None, group_sequences=1)
        for name, part in model.config.parts().items()
    }
    config = model.config.model_copy(update=parts)
    if config == model.config:
        return model
    result = meta_model(config)
    result.load_state_dict(model.state_dict(), assign=True)
    return result.train(model.training)
