"""What a model is made of: attention kind x FFN kind x stack x norm placement.

Every field's docstring is its documentation: `moa-dist config fields` prints
them. No torch here, so that a configuration can be checked anywhere.
"""

from __future__ import annotations

from math import lcm
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


class Section(BaseModel):
    """A part of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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
    """Who is dropped: the latest positions first, or the lowest scores first. The second looks at
    the whole group, so in a causal model a later token may displace an earlier one; and where
    scores differ by rounding only, as for equal tokens without positions, rounding decides."""


class BalanceConfig(Section):
    """Coefficients of the auxiliary losses, each a mean over groups of sequences, and a bias.

    Statistics are summed over all repeats of a shared layer before the loss is taken, so
    that repeats may specialise. Coefficients keep their meaning whatever the number of
    ranks, micro-batches or padding tokens.
    """

    scope: Literal["sequences", "micro_batch", "global_batch"] = "sequences"
    """Which tokens must be balanced among themselves. `sequences`: those of `group_sequences`
    sequences, so the loss does not depend on the layout; the strictest, as even one sequence may
    not prefer some experts. `micro_batch`: those of one rank's micro-batch, as most systems do; the
    loss then changes with the number of ranks and `train.micro_batch`. `global_batch`: those of the
    whole step on all ranks, exactly and in any layout, at the cost of one small all-reduce per
    forward; this lets experts specialise most. It needs `train.micro_batch` = `train.global_batch`
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
    (Mod-Squad, SUT). Minimising it makes single tokens decided and their average even."""
    bias_rate: NonNegativeFloat = 0.0
    """Balance without a loss (DeepSeek-V3, section 2.1.2): a bias per expert is added to the scores
    when experts are chosen, not when they are weighed, and after each step it moves up by this much
    where an expert's load was below the mean, down where above. Loads are those of the whole step:
    all ranks, micro-batches and repeats, before dropping, whatever the scope. 0 means no bias;
    DeepSeek-V3 uses 0.001 with sigmoid scores."""


class RouterConfig(Section):
    """Which experts a token takes, and with which weights."""

    num_experts: PositiveInt
    """Experts to choose from (SwitchHead: per head)."""
    top_k: PositiveInt
    """Experts chosen per token (SwitchHead: per head and token)."""
    score: Literal["softmax", "sigmoid"]
    """How logits become scores."""
    gate: Literal["raw", "renormalized", "renormalized_detached"] = "raw"
    """Weight of a chosen expert: its score as it is (the authors' released code and sigma-MoE);
    divided by the sum of the chosen scores (the same as a softmax over the chosen logits); or
    that with the sum detached from the gradient (MoA, equation 6). `raw` is the default since
    the published numbers were made with it and it trains the router even at `top_k` 1."""
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability, while training, that an expert is hidden from a token (sigma-MoE's regulariser);
    where less than `top_k` stay visible, some of the hidden are chosen all the same. Drawn per
    rank, so with it runs of different layouts are not equal token by token."""
    capacity: CapacityConfig | None = None
    """Limit per expert and group of sequences; absent means dropless."""
    group_sequences: PositiveInt = 1
    """Sequences per group in which capacity and, with `balance.scope` sequences, balance statistics
    are counted; must divide the micro-batch. With 1, neither drops nor losses depend on the layout.
    Larger groups are made of the sequences of one micro-batch, so they do."""
    balance: BalanceConfig = BalanceConfig()
    """Auxiliary losses and bias of this router."""


class DenseAttentionConfig(Section):
    """Multi-head attention."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads."""
    d_head: PositiveInt
    """Width of a head."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""


class MoAConfig(Section):
    """Mixture of attention heads (Zhang et al. 2022): experts are query and output projections."""

    kind: Literal["moa"] = "moa"
    """Names this kind."""
    d_head: PositiveInt
    """Width of a head."""
    heads_per_expert: PositiveInt = 1
    """Heads in one expert (1 in the paper); keys and values are shared by all experts."""
    router: RouterConfig
    """Chooses the experts of each query token."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""


class SwitchHeadConfig(Section):
    """SwitchHead (Csordas et al. 2023): dense queries and keys, expert values and outputs."""

    kind: Literal["switchhead"] = "switchhead"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads, each with one attention matrix and its own experts."""
    d_head: PositiveInt
    """Width of a head."""
    router: RouterConfig
    """Used twice: for values on the source token, for outputs on the destination token."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""


class DenseFFNConfig(Section):
    """Two-layer feed-forward network."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Nonlinearity."""
    gated: bool = False
    """Multiply the activation by a second linear projection (GLU)."""


class MoEFFNConfig(Section):
    """Mixture of feed-forward experts: sigma-MoE with sigmoid scores, or softmax MoE."""

    kind: Literal["moe"] = "moe"
    """Names this kind."""
    d_expert: PositiveInt
    """Hidden width of one expert."""
    router: RouterConfig
    """Chooses the experts of each token."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Nonlinearity."""
    gated: bool = False
    """Multiply the activation by a second linear projection (GLU)."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""


AttentionConfig = Annotated[
    DenseAttentionConfig | MoAConfig | SwitchHeadConfig, Field(discriminator="kind")
]
FFNConfig = Annotated[DenseFFNConfig | MoEFFNConfig, Field(discriminator="kind")]


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
    absent means all of `num_layers`. Must divide `num_layers`."""
    norm_placement: Literal["pre", "post", "peri"] = "pre"
    """`pre` and `post` as usual; `peri` (MoEUT section 2.3) normalises only what feeds a
    softmax or a sigmoid: queries, keys and routers."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation."""
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
    attention: AttentionConfig
    """Attention of every layer."""
    ffn: FFNConfig
    """Feed-forward part of every layer."""


def sequences_per_group(model: ModelConfig) -> int:
    """Sequences that cannot be parted, by both routers."""
    routers = [part.router for part in (model.attention, model.ffn) if part.kind != "dense"]
    return lcm(*(router.group_sequences for router in routers))


def whole_groups(num_sequences: int, model: ModelConfig) -> int:
    """That many or, so that no group is parted, a few more."""
    group = sequences_per_group(model)
    return -(-num_sequences // group) * group
