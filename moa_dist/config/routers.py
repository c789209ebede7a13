"""How a token finds its experts: a router, its capacity, its balance losses.

A new kind is a subclass of `RouterConfig`, a module, and a line in `moa_dist.moe.router_kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moa_dist.config.section import Kind, Section
from moa_dist.errors import Problem

_SHRUNK_TOP_K = 3
_ALIGNMENT = 8
"""Shrunk widths keep their remainder by it: kernels and rotated widths depend on that."""


def shrunk(size: int, at_least: int, modulus: int = _ALIGNMENT) -> int:
    """The least number from `at_least` up with the remainder of `size`, and never above `size`."""
    return min(size, at_least + (size - at_least) % modulus)


class CapacityConfig(Section):
    """A limit on the assignments that one expert takes from one group of sequences.

    The limit is `C = min(ceil(factor * top_k * tokens / num_experts), tokens)`, where `tokens`
    counts the real tokens of the group, so it does not depend on how ranks share the batch.
    """

    factor: PositiveFloat
    """Capacity relative to a perfectly even load."""
    policy: Literal["position", "probability", "choice"] = "position"
    """Order of dropping: latest positions first, lowest scores first, or last choices first and
    of these the latest (GShard). The latter two look at the whole group, so in a causal model a
    later token may displace an earlier one; and by `probability` rounding decides between scores
    that differ by rounding only, as those of equal tokens without positions."""


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

    pool_layers: bool = False
    """Sum statistics over all layers whose routers have equal settings before the losses are taken
    (RMoE), so that a layer need not use its experts evenly by itself."""
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


class GroupLimitConfig(Section):
    """A choice of groups of experts, within which a token's experts are chosen (DeepSeek-V3).

    A group's score is the sum of its two highest scores, bias included. With as many groups as
    `parallel.expert_parallel`, if that divides the experts, a token reaches few ranks.
    """

    num_groups: Annotated[int, Field(ge=2)]
    """Groups of consecutive experts, all of one size (SwitchHead: of each head's experts)."""
    top_groups: PositiveInt
    """Groups chosen per token."""

    def problems(self, path: str, num_experts: int, top_k: int) -> Iterable[Problem]:
        """Groups must be equal, hold two experts to score them by, and suffice for `top_k`."""
        limit = f"{path}.group_limit"
        size, rest = divmod(num_experts, self.num_groups)
        if rest or size < 2:
            yield Problem(
                f"`{limit}.num_groups` is {self.num_groups}, but `{path}.num_experts` = "
                f"{num_experts} does not make so many equal groups of two experts or more",
                (f"{limit}.num_groups", f"{path}.num_experts"),
            )
        elif self.top_groups >= self.num_groups:
            yield Problem(
                f"`{limit}.top_groups` is {self.top_groups} of {self.num_groups} groups, which "
                "limits nothing; choose fewer, or set `group_limit` to null",
                (f"{limit}.top_groups", f"{limit}.num_groups"),
            )
        elif top_k > self.top_groups * size:
            yield Problem(
                f"`{path}.top_k` is {top_k}, but {self.top_groups} groups of {size} experts have "
                f"{self.top_groups * size}",
                (f"{path}.top_k", f"{limit}.top_groups"),
            )


class ExpertsPerToken(NamedTuple):
    """How many experts of each router group a token takes."""

    mean: int
    """Mean over tokens, by which work and traffic are predicted."""
    most: int
    """Places for experts, of which a kind may leave some empty."""


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
    route_scale: PositiveFloat = 1.0
    """Multiplies all weights after the gate (`routed_scaling_factor` of DeepSeek-V3)."""
    group_limit: GroupLimitConfig | None = None
    """Groups of experts that are chosen first; null for none. On GPUs, the choice then takes
    several kernels instead of one; weights, statistics and gradients do not."""
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

    def experts_per_token(self, training: bool) -> ExpertsPerToken:
        """Return how many experts a token takes in training or, if not, in evaluation.

        Every prediction asks this, so that none takes one number for the other.
        """
        return ExpertsPerToken(self.top_k, self.top_k)

    @property
    def is_recurrent(self) -> bool:
        """Whether it takes a state from the layer before."""
        return False

    @property
    def num_tasks(self) -> int:
        """Tasks of sequences that this router tells apart; 0 if it does not know them."""
        return 0

    @property
    def sees_group_in_training(self) -> bool:
        """Whether a token's experts in training depend on all tokens of its group of sequences."""
        return False

    def problems(self, path: str) -> Iterable[Problem]:
        """Report what is wrong within this section, as `PartConfig.problems` does."""
        return ()

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """A router over fewer experts, of which some stay idle; see `moa_dist.config.shrink`.

        It has at least `at_least` experts, and the remainder by `expert_parallel` stays, so that
        ranks hold shares as unequal as before.
        """
        top_k = min(self.top_k, _SHRUNK_TOP_K)
        at_least, modulus = max(16 * top_k, at_least), expert_parallel
        if self.group_limit is not None:
            of_groups = self.group_limit.num_groups * max(2, top_k)
            at_least, modulus = max(at_least, of_groups), lcm(modulus, self.group_limit.num_groups)
        num_experts = shrunk(self.num_experts, at_least, modulus)
        if self.top_k == self.num_experts:
            top_k = num_experts
        return self.changed(num_experts=num_experts, top_k=top_k, expert_dropout=0.0)
