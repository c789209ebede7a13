"""What a model is made of: attention kind x FFN kind x stack x norm placement.

Every field's docstring is its documentation: `moa-dist config fields` prints it. Nothing here
imports torch, so a configuration can be checked anywhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny

from moa_dist.config.attention import AttentionConfig
from moa_dist.config.feed_forward import DenseFFNConfig, FFNConfig
from moa_dist.config.halting import HaltingConfig
from moa_dist.config.parts import PartConfig
from moa_dist.config.recursion import RecursionConfig
from moa_dist.config.routers import RouterConfig
from moa_dist.config.section import Section
from moa_dist.config.sharing import SharingConfig

Objective = Literal["causal", "masked", "translation"]


class ModelConfig(Section):
    """A language model: a decoder, an encoder, or both."""

    objective: Objective = "causal"
    """What the model learns. `causal`: the next token of a text. `masked`: tokens of a text that
    are hidden from it, seeing both sides (BERT; an encoder). `translation`: a text from its source
    text (Vaswani et al. 2017; an encoder and a decoder of `num_layers` each, whose layers attend to
    the encoder's output too, with an `attention` of their own)."""
    vocab_size: PositiveInt
    """Token ids run from 0 to this number, exclusive. `masked` needs one more than the tokenizer
    has: the last id stands for hidden tokens."""
    d_model: PositiveInt
    """Width of the residual stream (D)."""
    num_layers: PositiveInt
    """Layers applied, repeats counted."""
    num_distinct_layers: PositiveInt | None = None
    """Layers with their own parameters (MoEUT's group size G), applied in order ABAB...;
    absent means all. Must divide the number of layers between prelude and coda."""
    sharing: SharingConfig = SharingConfig()
    """What layers that repeat share, if not everything."""
    halting: SerializeAsAny[HaltingConfig] | None = None
    """How tokens leave the layers between prelude and coda early; null if they take all."""
    recursion: SerializeAsAny[RecursionConfig] | None = None
    """How tokens choose how often layers that repeat are applied to them (Mixture-of-Recursions);
    null if all repeats are applied to all."""
    prelude: Annotated[int, Field(ge=0)] = 0
    """First layers, applied once, with parameters of their own."""
    coda: Annotated[int, Field(ge=0)] = 0
    """Last layers, likewise."""
    prelude_ffn: DenseFFNConfig | None = None
    """Feed-forward part of the prelude, such as that of DeepSeek-V3's first layers; null for
    `ffn`."""
    norm_placement: Literal["pre", "post", "peri"] = "pre"
    """`pre` and `post` as usual; `peri` (MoEUT section 2.3) normalizes only what feeds a
    softmax or a sigmoid: queries, keys and routers."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalization."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance before its root is taken, in every norm."""
    final_norm_eps: PositiveFloat | None = None
    """The same of the norm before the head; null for `norm_eps`. They differ in JetMoE as
    transformers builds it."""
    position: Literal["none", "sinusoidal"] = "none"
    """Absolute positions added to the embedding, for models without rotary positions."""
    scale_embeddings: bool = False
    """Multiply embeddings by `sqrt(d_model)` (Vaswani et al. 2017, section 3.4), which makes them
    as large as sinusoidal positions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability, while training, that an element of the embeddings, or of what a layer's part
    adds to the residual stream, is zero. Drawn per rank, like expert dropout."""
    tie_embeddings: bool = False
    """Use the embedding matrix as output head; one matrix for source and target in
    translation."""
    head_bias: bool = True
    """Bias in the output head."""
    logit_soft_cap: PositiveFloat | None = None
    """Bound of the output head's logits: each becomes `cap * tanh(logit / cap)`. It is 30 in
    Gemma 2; null for none."""
    attention: SerializeAsAny[AttentionConfig]
    """Attention of every layer."""
    ffn: SerializeAsAny[FFNConfig]
    """Feed-forward part of every layer."""

    @property
    def num_core_layers(self) -> int:
        """Applications of layers between prelude and coda."""
        return self.num_layers - self.prelude - self.coda

    @property
    def num_repeats(self) -> int:
        """Applications of each of them."""
        return self.num_core_layers // (self.num_distinct_layers or max(self.num_core_layers, 1))

    @property
    def num_tasks(self) -> int:
        """Tasks that routers tell apart; 0 if no router needs to know a sequence's task."""
        return max((router.num_tasks for router in self.routers().values()), default=0)

    def parts(self) -> dict[str, PartConfig]:
        """All parts that layers are made of, experts or not, by their field."""
        prelude = {} if self.prelude_ffn is None else {"prelude_ffn": self.prelude_ffn}
        return {"attention": self.attention, "ffn": self.ffn, **prelude}

    def routed_parts(self) -> dict[str, PartConfig]:
        """The parts of a layer that have experts."""
        return {name: part for name, part in self.parts().items() if part.routers}

    def routers(self) -> dict[str, RouterConfig]:
        """All routers of a layer by their path in the model, such as `attention.router`."""
        of_parts = {
            f"{part}.{name}": router
            for part, section in self.parts().items()
            for name, router in section.routers.items()
        }
        num_repeats = max(self.num_repeats, 1)  # it may be invalid, which is reported as such
        of_depth = {} if self.recursion is None else self.recursion.routers(num_repeats)
        return of_parts | of_depth

    @property
    def looks_ahead(self) -> str | None:
        """Why a causal model's tokens may depend on later ones; None if they do not."""
        if self.recursion is None or self.objective == "masked":
            return None
        return self.recursion.looks_ahead
