"""What a model is made of: attention kind x FFN kind x stack x norm placement.

A new kind of attention or feed-forward part is a subclass of its family here, which knows its
routers, its experts and how to shrink; a module; and a line in `moa_dist.models.kinds`. Every
field's docstring is its documentation: `moa-dist config fields` prints it. Nothing here imports
torch, so a configuration can be checked anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny

from moa_dist.config.halting import HaltingConfig
from moa_dist.config.positions import RopeConfig, WindowConfig
from moa_dist.config.recursion import RecursionConfig
from moa_dist.config.routers import RouterConfig, shrunk
from moa_dist.config.section import Kind, Section
from moa_dist.config.sharing import SharingConfig
from moa_dist.errors import Problem

Part = Literal["attention", "ffn"]
"""The two parts of a layer that may hold experts."""
PARTS: tuple[Part, ...] = ("attention", "ffn")

Recompute = bool | tuple[Literal["attention", "ffn", "experts"], ...]
"""Which activations the backward pass computes again: see `TrainConfig.recompute`."""


def recomputed_parts(recompute: Recompute) -> frozenset[str]:
    """Return what is computed again, where `block` is a whole layer; nothing is twice."""
    if isinstance(recompute, bool):
        return frozenset({"block"} if recompute else ())
    return frozenset(recompute)


_SHRUNK_WIDTH, _SHRUNK_D_FF, _SHRUNK_HEADS = 8, 32, 2


class PartConfig(Kind):
    """What the schema of an attention or FFN kind says of itself; a dense kind has no router."""

    @property
    def routers(self) -> dict[str, RouterConfig]:
        """Routers by the field that holds them."""
        return {name: value for name, value in self if isinstance(value, RouterConfig)}

    @property
    def num_flat_experts(self) -> int:
        """Experts of one layer among which expert parallelism divides, all heads together.

        0 for a dense kind; the fewest of any router where there are several.
        """
        return min((router.num_experts for router in self.routers.values()), default=0)

    def problems(self, path: str) -> Iterable[Problem]:
        """Report what is wrong within this section, which is found at `path`; nothing by default.

        A kind whose own sizes must fit each other overrides it.
        """
        return ()

    def with_routers(self, **fields: Any) -> Self:
        """A copy with other values in these fields of all its routers."""
        routers = {name: router.changed(**fields) for name, router in self.routers.items()}
        return self.model_copy(update=routers)

    def shrink(self, expert_parallel: int) -> Self:
        """A small copy that makes the same choices; see `moa_dist.config.shrink`.

        By default only the routers shrink: a kind that has sizes of its own shrinks these too.
        """
        return self.changed(**self._shrunk_routers(expert_parallel))

    def _shrunk_routers(self, expert_parallel: int) -> dict[str, RouterConfig]:
        return {
            name: router.shrink(expert_parallel, expert_parallel)
            for name, router in self.routers.items()
        }


class AttentionConfig(PartConfig):
    """The family of attention kinds."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    d_head: PositiveInt
    """Width of a head."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""
    window: WindowConfig | None = None
    """How far queries see, in some layers or in all; null for no limit."""
    soft_cap: PositiveFloat | None = None
    """Bound of the logits of the softmax: each becomes `soft_cap * tanh(logit / soft_cap)`. It is
    50 in Gemma 2. No fused kernel of torch has it, so attention is then computed a block of queries
    at a time, and again in the backward pass: slower, with as little memory."""
    qk_norm: bool = False
    """Normalize every head's queries and keys before they are rotated: an RMSNorm each, with
    learned scales that all heads share (Henry et al. 2020; as in Qwen3)."""

    @property
    def is_causal(self) -> bool:
        """Whether a query can see the keys before it only, as such a kind is defined."""
        return False

    def without_positions(self) -> Self:
        """Return a copy that does not know where tokens are, to attend to another text."""
        return self.model_copy(update={"rope": None})

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow heads and window, but leave at least one pair of dimensions to rotate."""
        window = None if self.window is None else self.window.shrink()
        ropes = [self.rope, None if window is None else window.rope]
        fraction = min((rope.fraction for rope in ropes if rope is not None), default=1.0)
        d_head = shrunk(self.d_head, max(_SHRUNK_WIDTH, ceil(2 / fraction)))
        routers = self._shrunk_routers(expert_parallel)
        return self.changed(d_head=d_head, window=window, **routers)


class DenseAttentionConfig(AttentionConfig):
    """Multi-head attention."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads of queries."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, each for equally many consecutive heads of queries (Ainslie et al.
    2023); null for as many."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def problems(self, path: str) -> Iterable[Problem]:
        """Heads of keys and values must divide those of queries."""
        if self.num_heads % self.kv_heads:
            yield Problem(
                f"`{path}.num_kv_heads` is {self.num_kv_heads}, which does not divide "
                f"`{path}.num_heads` = {self.num_heads}",
                (f"{path}.num_kv_heads", f"{path}.num_heads"),
            )

    def shrink(self, expert_parallel: int) -> Self:
        """Keep a few narrow heads, which share keys and values if they did."""
        heads = min(self.num_heads, _SHRUNK_HEADS)
        kv_heads = 1 if self.kv_heads < self.num_heads else None
        return super().shrink(expert_parallel).changed(num_heads=heads, num_kv_heads=kv_heads)


class MoAConfig(AttentionConfig):
    """Mixture of attention heads (Zhang et al. 2022): experts are query and output projections."""

    kind: Literal["moa"] = "moa"
    """Names this kind."""
    heads_per_expert: PositiveInt = 1
    """Heads in one expert (1 in the paper); keys and values are shared by all experts."""
    attend: Literal["softmax", "stick_breaking"] = "softmax"
    """How queries and keys weigh values: by a softmax, or by breaking a stick from the nearest key
    on, which knows the order of keys by itself and is causal (ModuleFormer)."""
    relative_positions: PositiveInt | None = None
    """Distance up to which each head of an expert learns a vector per distance, and beyond which it
    does not tell them apart: it is added to keys (Shaw et al. 2018; 63 in SUT). Null for none."""
    kv_bias: bool = False
    """Add biases to keys and values."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each query token."""
    shared_experts: NonNegativeInt = 0
    """Experts that every query token uses with weight 1, next to those that it is routed to. They
    share keys and values with these, and every rank holds them."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    @property
    def is_causal(self) -> bool:
        """Whether a query can see the keys before it only."""
        return self.attend == "stick_breaking"

    def without_positions(self) -> Self:
        """Return a copy without relative positions either."""
        return super().without_positions().model_copy(update={"relative_positions": None})

    def problems(self, path: str) -> Iterable[Problem]:
        """Stick-breaking attention knows the order of keys by itself."""
        if self.is_causal and self.relative_positions is not None:
            key = f"{path}.relative_positions"
            yield Problem(
                f"`{key}` does not work with `{path}.attend` {self.attend}; remove it",
                (key, f"{path}.attend"),
            )

    def shrink(self, expert_parallel: int) -> Self:
        """Keep a few narrow heads in each of fewer experts."""
        heads = min(self.heads_per_expert, _SHRUNK_HEADS)
        shared = min(self.shared_experts, _SHRUNK_HEADS)
        result = super().shrink(expert_parallel)
        return result.changed(heads_per_expert=heads, shared_experts=shared)


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead (Csordas et al. 2023): dense queries and keys, expert values and outputs."""

    kind: Literal["switchhead"] = "switchhead"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads, each with one attention matrix and its own experts."""
    router: SerializeAsAny[RouterConfig]
    """Used twice: for values on the source token, for outputs on the destination token."""
    shared_experts: bool = False
    """Give every head a value and an output expert that all tokens use with weight 1, next to those
    that they are routed to. Every head is on for all tokens already. Every rank holds them."""

    @property
    def num_flat_experts(self) -> int:
        """Experts of all heads."""
        return self.num_heads * self.router.num_experts

    def shrink(self, expert_parallel: int) -> Self:
        """Keep the remainders by ep of both heads and experts, which are sharded together."""
        router = self.router.shrink(ceil(expert_parallel / self.num_heads), expert_parallel)
        enough = max(_SHRUNK_HEADS, ceil(expert_parallel / router.num_experts))
        heads = shrunk(self.num_heads, enough, expert_parallel)
        return super().shrink(expert_parallel).changed(num_heads=heads, router=router)


class FFNConfig(PartConfig):
    """The family of feed-forward kinds."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Nonlinearity."""
    gated: bool = False
    """Multiply the activation by a second linear projection (GLU)."""
    bias: bool = False
    """Add biases to all projections, of each expert its own."""


class DenseFFNConfig(FFNConfig):
    """Two-layer feed-forward network."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width."""

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow the hidden layer."""
        return self.changed(d_ff=shrunk(self.d_ff, _SHRUNK_D_FF))


class SharedExpertConfig(Section):
    """An expert that every token uses, next to those that the router chooses for it."""

    d_expert: PositiveInt
    """Hidden width; several shared experts of DeepSeek-V3 are one of their joint width."""
    sigmoid_gate: bool = False
    """Weigh its output by the sigmoid of a linear map of what the router reads (Qwen2-MoE)."""


class MoEFFNConfig(FFNConfig):
    """Mixture of feed-forward experts: sigma-MoE with sigmoid scores, or softmax MoE."""

    kind: Literal["moe"] = "moe"
    """Names this kind."""
    d_expert: PositiveInt
    """Hidden width of one expert."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each token."""
    shared_expert: SharedExpertConfig | None = None
    """An expert that every token uses, with the same `activation` and `gated`; null for none. Every
    rank holds it."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    def shrink(self, expert_parallel: int) -> Self:
        """Keep fewer and narrower experts."""
        shared = self.shared_expert
        if shared is not None:
            shared = shared.changed(d_expert=shrunk(shared.d_expert, _SHRUNK_WIDTH))
        d_expert = shrunk(self.d_expert, _SHRUNK_WIDTH)
        result = super().shrink(expert_parallel)
        return result.changed(d_expert=d_expert, shared_expert=shared)


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
