"""What a model is made of: attention kind x FFN kind x stack x norm placement.

A new kind of attention, feed-forward part or router is a subclass of its family here, which knows
its routers, its experts and how to shrink; a module; and a line in `moa_dist.models.kinds`, or for
routers in `moa_dist.moe.router_kinds`. Every field's docstring is its documentation: `moa-dist
config fields` prints it. Nothing here imports torch, so a configuration can be checked anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, SerializeAsAny

from moa_dist.config.section import Kind, Section
from moa_dist.config.sharing import SharingConfig
from moa_dist.errors import Problem

Part = Literal["attention", "ffn"]
"""The two parts of a layer that may hold experts."""
PARTS: tuple[Part, ...] = ("attention", "ffn")

_SHRUNK_WIDTH, _SHRUNK_D_FF, _SHRUNK_HEADS, _SHRUNK_TOP_K = 8, 32, 2, 3
_ALIGNMENT = 8
"""Shrunk widths keep their remainder by it: kernels and rotated widths depend on that."""


def shrunk(size: int, at_least: int, modulus: int = _ALIGNMENT) -> int:
    """The least number from `at_least` up with the remainder of `size`, and never above `size`."""
    return min(size, at_least + (size - at_least) % modulus)


class RopeConfig(Section):
    """Rotary position embedding, rotate-half pairing."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each head's dimensions that is rotated; the width is rounded down to even."""
    base: PositiveFloat = 10000.0
    """Wavelength base."""


class CapacityConfig(Section):
    """A limit on the assignments that one expert takes from one group of sequences.

    The limit is `C = min(ceil(factor * top_k * tokens / num_experts), tokens)`, where `tokens`
    counts the real tokens of the group, so it does not depend on how ranks share the batch.
    """

    factor: PositiveFloat
    """Capacity relative to a perfectly even load."""
    policy: Literal["position", "probability"] = "position"
    """Order of dropping: latest positions first, or lowest scores first. The latter looks at the
    whole group, so in a causal model a later token may displace an earlier one; and rounding
    decides between scores that differ by rounding only, as those of equal tokens without
    positions."""


class BalanceConfig(Section):
    """Coefficients of the auxiliary losses, each a mean over groups of sequences, and a bias.

    Statistics are summed over all repeats of a shared layer before the loss is taken, so
    that repeats may specialize. Coefficients keep their meaning whatever the number of
    ranks, micro-batches or padding tokens.
    """

    scope: Literal["sequences", "micro_batch", "global_batch"] = "sequences"
    """Set of tokens over which load is balanced. `sequences`: those of `group_sequences` sequences,
    so the loss does not depend on the layout; the strictest choice, as not even a single sequence
    may prefer some experts. `micro_batch`: those of one rank's micro-batch, as most systems do; the
    loss then changes with the number of ranks and `train.micro_batch`. `global_batch`: those of the
    whole step on all ranks, exactly and in any layout, at the cost of one small all-reduce per
    forward; this lets experts specialize most. It needs `train.micro_batch` = `train.global_batch`
    / ranks, since an accumulated step never holds all its tokens at once. In evaluation, where no
    loss is used, it counts like `micro_batch`. Capacity is always per `group_sequences`."""

    switch: NonNegativeFloat = 0.0
    """Switch balance `E * sum_e f_e P_e` (f: share of assignments, P: mean probability)."""
    z_loss: NonNegativeFloat = 0.0
    """Mean squared `logsumexp` of the router's logits."""
    entropy: NonNegativeFloat = 0.0
    """Negative entropy of the mean probability (MoEUT section 2.2)."""
    mutual_information: NonNegativeFloat = 0.0
    """`H(e|x) - H(e)`: the mean entropy of a token's probabilities less the entropy of their mean
    (Mod-Squad, SUT). Minimizing it makes each token's choice certain and the average even."""
    bias_rate: NonNegativeFloat = 0.0
    """Balance without a loss (DeepSeek-V3, section 2.1.2): a bias per expert is added to the scores
    when experts are chosen, not when they are weighed, and after each step it moves up by this much
    where an expert's load was below the mean, down where above. Loads are those of the whole step:
    all ranks, micro-batches and repeats, before dropping, whatever the scope. 0 means no bias;
    DeepSeek-V3 uses 0.001 with sigmoid scores."""


class RouterConfig(Kind):
    """Which experts a token takes, and with which weights. A family with one kind: `topk`."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    kind: str = "topk"
    """Names this kind: the top K of linear logits."""
    num_experts: PositiveInt
    """Number of experts to choose from (SwitchHead: per head)."""
    top_k: PositiveInt
    """Experts chosen per token (SwitchHead: per head and token)."""
    score: Literal["softmax", "sigmoid"]
    """Function that turns logits into scores."""
    gate: Literal["raw", "renormalized", "renormalized_detached"] = "raw"
    """Weight of a chosen expert: its score as it is (the authors' released code and sigma-MoE);
    divided by the sum of the chosen scores (the same as a softmax over the chosen logits); or
    that with the sum detached from the gradient (MoA, equation 6). `raw` is the default since
    the published numbers were made with it and it trains the router even at `top_k` 1."""
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability, in training, that an expert is hidden from a token (sigma-MoE's regularizer). If
    fewer than `top_k` stay visible, hidden ones are chosen too. It is drawn per rank, so runs of
    different layouts are not equal token by token."""
    capacity: CapacityConfig | None = None
    """Limit per expert and group of sequences; absent means dropless."""
    group_sequences: PositiveInt = 1
    """Sequences per group in which capacity and, with `balance.scope` sequences, balance statistics
    are counted; must divide the micro-batch. With 1, neither drops nor losses depend on the layout.
    Larger groups are made of the sequences of one micro-batch, so they do."""
    balance: BalanceConfig = BalanceConfig()
    """Auxiliary losses and bias of this router."""

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """A router over fewer experts, of which some stay idle; see `moa_dist.config.shrink`.

        It has at least `at_least` experts, and the remainder by `expert_parallel` stays, so that
        ranks hold shares as unequal as before.
        """
        top_k = min(self.top_k, _SHRUNK_TOP_K)
        num_experts = shrunk(self.num_experts, max(16 * top_k, at_least), expert_parallel)
        if self.top_k == self.num_experts:
            top_k = num_experts
        return self.changed(num_experts=num_experts, top_k=top_k, expert_dropout=0.0)


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
    qk_norm: bool = False
    """Normalize every head's queries and keys before they are rotated: an RMSNorm each, with
    learned scales that all heads share (Henry et al. 2020; as in Qwen3)."""

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow the heads, but leave at least one pair of dimensions to rotate."""
        fraction = 1.0 if self.rope is None else self.rope.fraction
        d_head = shrunk(self.d_head, max(_SHRUNK_WIDTH, ceil(2 / fraction)))
        return self.changed(d_head=d_head, **self._shrunk_routers(expert_parallel))


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
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each query token."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    def shrink(self, expert_parallel: int) -> Self:
        """Keep a few narrow heads in each of fewer experts."""
        heads = min(self.heads_per_expert, _SHRUNK_HEADS)
        return super().shrink(expert_parallel).changed(heads_per_expert=heads)


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead (Csordas et al. 2023): dense queries and keys, expert values and outputs."""

    kind: Literal["switchhead"] = "switchhead"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads, each with one attention matrix and its own experts."""
    router: SerializeAsAny[RouterConfig]
    """Used twice: for values on the source token, for outputs on the destination token."""

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


class DenseFFNConfig(FFNConfig):
    """Two-layer feed-forward network."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width."""

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow the hidden layer."""
        return self.changed(d_ff=shrunk(self.d_ff, _SHRUNK_D_FF))


class MoEFFNConfig(FFNConfig):
    """Mixture of feed-forward experts: sigma-MoE with sigmoid scores, or softmax MoE."""

    kind: Literal["moe"] = "moe"
    """Names this kind."""
    d_expert: PositiveInt
    """Hidden width of one expert."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each token."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    def shrink(self, expert_parallel: int) -> Self:
        """Keep fewer and narrower experts."""
        d_expert = shrunk(self.d_expert, _SHRUNK_WIDTH)
        return super().shrink(expert_parallel).changed(d_expert=d_expert)


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

    def parts(self) -> dict[str, PartConfig]:
        """All parts that layers are made of, experts or not, by their field."""
        prelude = {} if self.prelude_ffn is None else {"prelude_ffn": self.prelude_ffn}
        return {"attention": self.attention, "ffn": self.ffn, **prelude}

    def routed_parts(self) -> dict[str, PartConfig]:
        """The parts of a layer that have experts."""
        return {name: part for name, part in self.parts().items() if part.routers}

    def routers(self) -> dict[str, RouterConfig]:
        """All routers of a layer by their path in the model, such as `attention.router`."""
        return {
            f"{part}.{name}": router
            for part, section in self.parts().items()
            for name, router in section.routers.items()
        }
