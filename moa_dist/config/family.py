"""Relatives of MoA and MoEUT: kinds of attention, feed-forward part and router from other papers.

`configs/family/README.md` shows each as a configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
)

from moa_dist.config.attention import AttentionConfig, DenseAttentionConfig
from moa_dist.config.feed_forward import ActivationName, FFNConfig, MoEFFNConfig
from moa_dist.config.routers import ExpertsPerToken, RouterConfig, shrunk
from moa_dist.errors import Problem


class MoHConfig(AttentionConfig):
    """Mixture-of-head attention: all heads attend, and a token takes the results of some or all."""

    kind: Literal["moh"] = "moh"
    """Names this kind."""
    num_shared_heads: NonNegativeInt = 0
    """Heads that every token takes. A second gate divides its weight between them and the others;
    both have gates that are softmaxes."""
    bias: bool = False
    """Add biases to queries, keys, values and the output."""
    router: SerializeAsAny[RouterConfig]
    """Chooses from the other heads: an expert is the output projection of `heads_per_expert`."""
    heads_per_expert: PositiveInt = 1
    """Routed heads that a token takes together (1 in the paper). An expert with as many heads as a
    dense model is all of its attention, keys and values included, as in BAM."""


class ComposedAttentionConfig(DenseAttentionConfig):
    """Dense attention whose heads are composed anew for each pair of tokens (DCMHA)."""

    kind: Literal["composed"] = "composed"  # type: ignore[assignment]  # not that of its base
    """Names this kind."""
    d_compose: PositiveInt | None = None
    """Hidden width of the layer that computes compositions; null for four times the heads."""

    def problems(self, path: str) -> Iterable[Problem]:
        """Heads are composed one with one, without a bound on what is composed."""
        yield from super().problems(path)
        if self.soft_cap is not None:
            key = f"{path}.soft_cap"
            yield Problem(f"`{key}` does not work with composed heads; remove it", (key,))
        if self.kv_heads != self.num_heads:
            yield Problem(
                f"`{path}.num_kv_heads` is {self.num_kv_heads}, but composed heads have keys and "
                "values of their own; remove it",
                (f"{path}.num_kv_heads",),
            )


class ResidualMoEConfig(MoEFFNConfig):
    """Experts and a dense part, mixed per token (Residual MoE of DeepSpeed-MoE)."""

    kind: Literal["residual_moe"] = "residual_moe"  # type: ignore[assignment]  # as above
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width of the dense part."""

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow the dense part too."""
        return super().shrink(expert_parallel).changed(d_ff=shrunk(self.d_ff, 16))


class GShardRouterConfig(RouterConfig):
    """The top K of a softmax, where first choices count (GShard; top-2 gating of DeepSpeed).

    With a capacity, a token's weights are renormalized over the choices that are not dropped.
    """

    kind: Literal["gshard"] = "gshard"
    """Names this kind."""
    score: Literal["softmax"] = "softmax"
    """Function that turns logits into scores."""
    gate: Literal["renormalized"] = "renormalized"
    """Weight of a chosen expert."""
    top_k: Annotated[int, Field(ge=2)]
    """Experts chosen per token. A weight is renormalized, so of one it would always be 1."""
    first_choice: NonNegativeFloat = 0.0
    """Coefficient of `E * sum_e f_e P_e`, where f_e is the share of tokens whose first choice is e,
    and P_e the mean score of e."""


class TaskRouterConfig(RouterConfig):
    """The top K of logits that are another linear map for each task of sequences (Mod-Squad).

    Sequences have the `task` of the folder of data that they come from.
    """

    kind: Literal["task"] = "task"
    """Names this kind."""
    tasks: Annotated[int, Field(ge=2)]
    """Number of tasks."""
    score: Literal["softmax"] = "softmax"
    """Function that turns logits into scores."""
    epsilon: PositiveFloat = 1e-4
    """Added to every score, and within the logarithm of the loss on tasks."""
    task_information: NonNegativeFloat = 0.0
    """Coefficient of minus the mutual information of tasks and experts, nats: minimizing it gives
    tasks experts of their own. Balance losses keep taking all tasks together."""

    @property
    def num_tasks(self) -> int:
        """Tasks of sequences that this router tells apart."""
        return self.tasks

    def problems(self, path: str) -> Iterable[Problem]:
        """Weights are scores, and tasks differ only between sequences."""
        if self.gate != "raw":
            yield Problem(f"`{path}.gate` must be raw, the default; remove it", (f"{path}.gate",))
        alone = self.balance.scope == "sequences" and self.group_sequences == 1
        if self.task_information and alone:
            yield Problem(
                f"`{path}.task_information` compares tasks within a group of sequences, but a "
                "group is one sequence, which has one task; set `balance.scope` to global_batch, "
                "or raise `group_sequences`",
                (f"{path}.task_information", f"{path}.balance.scope", f"{path}.group_sequences"),
            )


class ThresholdRouterConfig(RouterConfig):
    """Every expert whose logit stands out: a varying number per token, at least one (Monet).

    In training a logit is compared with those of its group of sequences, later tokens included; in
    evaluation and generation with running statistics of training, token by token.
    """

    kind: Literal["threshold"] = "threshold"
    """Names this kind."""
    num_heads: PositiveInt = 1
    """Choices per token, all among the same experts, each with weights that sum to 1."""
    top_k: PositiveInt
    """Experts per head of which logits, were they normal, would reach the threshold."""
    score: Literal["softmax"] = "softmax"
    """Function that turns the logits of chosen experts into scores."""

    def experts_per_token(self, training: bool) -> ExpertsPerToken:
        """The mean counts experts that at least one head takes, if heads choose at random."""
        missed = (1 - self.top_k / self.num_experts) ** self.num_heads
        return ExpertsPerToken(max(1, round(self.num_experts * (1 - missed))), self.num_experts)

    @property
    def sees_group_in_training(self) -> bool:
        """Whether a token's experts in training depend on all tokens of its group of sequences."""
        return True

    def problems(self, path: str) -> Iterable[Problem]:
        """Refuse what belongs to a fixed number of experts, or a threshold that all reach."""
        if self.top_k == self.num_experts:
            keys = (f"{path}.top_k", f"{path}.num_experts")
            yield Problem(f"`{path}.top_k` takes all experts; choose fewer", keys)
        yield from _without_choice(self, path, self.capacity is not None)

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """Keep few heads."""
        result = super().shrink(at_least, expert_parallel)
        return result.changed(num_heads=min(self.num_heads, 2))


class MonetConfig(FFNConfig):
    """Experts that are pairs of two halves, each half chosen by a router of its own (Monet).

    `num_experts` of the router are halves of each sort, and so the root of the number of experts.
    """

    kind: Literal["monet"] = "monet"
    """Names this kind."""
    decomposition: Literal["horizontal", "vertical"]
    """What halves are: `horizontal`, the first and the second matrix of an expert; `vertical`, the
    left and right half of its hidden units, and the upper and lower half of its output."""
    d_expert: PositiveInt
    """Hidden width of an expert."""
    router: SerializeAsAny[ThresholdRouterConfig]
    """Used twice, once for each sort of halves."""
    activation: ActivationName = "relu_squared"
    """Nonlinearity."""

    def problems(self, path: str) -> Iterable[Problem]:
        """Halves must be whole, and have no gate."""
        if self.gated:
            yield Problem(f"`{path}.gated` does not work with Monet; remove it", (f"{path}.gated",))
        if self.decomposition == "vertical" and self.d_expert % 2:
            key = f"{path}.d_expert"
            yield Problem(f"`{key}` is {self.d_expert}, which has no two halves", (key,))

    def shrink(self, expert_parallel: int) -> Self:
        """Keep fewer and narrower halves."""
        result = super().shrink(expert_parallel)
        return result.changed(d_expert=shrunk(self.d_expert, 8))


class DenseTrainingRouterConfig(RouterConfig):
    """All experts in training, the top K of them in evaluation and generation (DS-MoE)."""

    kind: Literal["dense_training"] = "dense_training"
    """Names this kind."""

    def experts_per_token(self, training: bool) -> ExpertsPerToken:
        """In training, all."""
        number = self.num_experts if training else self.top_k
        return ExpertsPerToken(number, number)

    def problems(self, path: str) -> Iterable[Problem]:
        """Refuse what belongs to a choice in training."""
        yield from _without_choice(self, path, self.capacity is not None)


class MLPRouterConfig(RouterConfig):
    """The top K of logits that have a hidden layer (ModuleFormer, Sparse Universal Transformer)."""

    kind: Literal["mlp"] = "mlp"
    """Names this kind."""
    d_hidden: PositiveInt
    """Width of the hidden layer."""
    activation: Literal["gelu", "tanh", "relu"] = "gelu"
    """Nonlinearity of the hidden layer, which has a bias."""
    gate_eps: PositiveFloat | None = None
    """Divide the weights of chosen experts by their sum plus this (1e-6 in SUT), instead of `gate`
    renormalized. Null for no division."""

    def problems(self, path: str) -> Iterable[Problem]:
        """Weights are divided once."""
        if self.gate_eps is not None and (self.gate != "raw" or self.route_scale != 1):
            yield Problem(
                f"`{path}.gate_eps` divides weights by their sum; leave `{path}.gate` raw and "
                f"`{path}.route_scale` 1",
                (f"{path}.gate_eps", f"{path}.gate", f"{path}.route_scale"),
            )
        if self.gate_eps is not None and self.top_k == 1 < self.num_experts:
            yield Problem(
                f"`{path}.gate_eps` with `{path}.top_k` 1 makes every weight 1, so the task loss "
                "would never train the router; remove it",
                (f"{path}.gate_eps", f"{path}.top_k"),
            )

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """Narrow the hidden layer."""
        return super().shrink(at_least, expert_parallel).changed(d_hidden=shrunk(self.d_hidden, 8))


class RecurrentRouterConfig(RouterConfig):
    """The top K of logits of a state that routers hand on from layer to layer (RMoE)."""

    kind: Literal["recurrent"] = "recurrent"
    """Names this kind."""
    d_state: PositiveInt
    """Width of the state. One recurrent unit serves the routers of one name in all layers."""

    @property
    def is_recurrent(self) -> bool:
        """Whether it takes a state from the layer before."""
        return True

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """Narrow the state."""
        return super().shrink(at_least, expert_parallel).changed(d_state=shrunk(self.d_state, 8))


class ReLURouterConfig(RouterConfig):
    """Every expert with a positive logit, weighted by it: a varying number per token (ReMoE)."""

    kind: Literal["relu"] = "relu"
    """Names this kind."""
    top_k: PositiveInt
    """Mean number of experts per token that the loss of sparsity aims at."""
    score: Literal["relu"] = "relu"  # type: ignore[assignment]  # not one of the others
    """Function that turns logits into scores."""
    max_experts: PositiveInt | None = None
    """Most experts that a token takes, those with the largest logits; null for all. Memory of the
    exchange and, on GPUs, of hidden rows grows with it."""
    sparsity: PositiveFloat = 1e-8
    """Coefficient, at the first step, of the loss that makes weights sparse."""
    sparsity_multiplier: Annotated[float, Field(gt=1)] = 1.2
    """After each step the coefficient is multiplied by this if tokens took more experts than
    `top_k` in the mean over all layers, and divided by it if not."""

    def experts_per_token(self, training: bool) -> ExpertsPerToken:
        """The mean is what the loss of sparsity aims at; a model that learns begins above it."""
        return ExpertsPerToken(self.top_k, self.max_experts or self.num_experts)

    def problems(self, path: str) -> Iterable[Problem]:
        """Refuse what belongs to a fixed number of experts."""
        if self.max_experts is not None and not self.top_k <= self.max_experts <= self.num_experts:
            yield Problem(
                f"`{path}.max_experts` is {self.max_experts}; it must be from `top_k` = "
                f"{self.top_k} to `num_experts` = {self.num_experts}",
                (f"{path}.max_experts", f"{path}.top_k", f"{path}.num_experts"),
            )
        yield from _without_choice(self, path)

    def shrink(self, at_least: int, expert_parallel: int) -> Self:
        """Keep the limit in the same place."""
        smaller = super().shrink(at_least, expert_parallel)
        limit = None if self.max_experts is None else min(self.max_experts, smaller.num_experts)
        return smaller.changed(max_experts=limit)


def _without_choice(router: RouterConfig, path: str, capacity: bool = False) -> Iterator[Problem]:
    """Refuse what chooses or weighs a fixed number of experts; `capacity` if it is set as well."""
    for field, is_set in {
        "gate": router.gate != "raw",
        "group_limit": router.group_limit is not None,
        "expert_dropout": router.expert_dropout > 0,
        "balance.bias_rate": router.balance.bias_rate > 0,
        "capacity": capacity,
    }.items():
        if is_set:
            yield Problem(
                f"`{path}.{field}` is for a fixed number of chosen experts, which `{path}.kind` = "
                f"{router.kind} does not have; remove it",
                (f"{path}.{field}", f"{path}.kind"),
            )
