"""Feed-forward kinds: dense, and a mixture of experts (sigma-MoE or softmax MoE).

Shapes: B sequences of S tokens, D model width, F hidden width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.feed_forward import DenseFFNConfig, FFNConfig, MoEFFNConfig
from moa_dist.config.parts import Part
from moa_dist.kernels.activations import ACTIVATIONS
from moa_dist.kernels.gradient_sum import alias
from moa_dist.models.linear import Bias, Linear
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Constant, Initializer, LastRowZero, Normal
from moa_dist.moe.routed_module import (
    NOTHING_GATHERED,
    Gathered,
    RoutedModule,
    RoutedProjection,
    recurrent_states,
)
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_kinds import make_router
from moa_dist.moe.router_logits import RouterLogits
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.moe.token_state import NO_STATE, TokenState
from moa_dist.profiling import annotated


class FeedForwardOutput(NamedTuple):
    """Result of a feed-forward part."""

    y: Tensor
    """[B, S, D]."""
    statistics: dict[str, RoutingStatistics]
    """By the name of the router within the part; empty for a dense one."""
    routing: dict[str, Routing]
    """What the routers decided, by the same names; empty if no trace was asked for."""
    states: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """States of recurrent routers for the next layer, by the same names."""


class FFNContext(NamedTuple):
    """What a feed-forward part is applied with, other than tokens."""

    token_mask: Tensor | None
    """[B, S] bool, true for real tokens; None when there is no padding."""
    gathered: Gathered
    """Weights of all experts where they were gathered."""
    state: TokenState = NO_STATE
    """What routers know of tokens."""


class FeedForward(nn.Module, ABC):
    """A kind of feed-forward part, built like an `Attention`.

    One with experts is a `RoutedModule` too.
    """

    part: ClassVar[Part] = "ffn"

    def routers(self) -> dict[str, Router]:
        """All routers, by the names under which their statistics are returned.

        A single router has an empty name: it is called by the name of the part.
        """
        return {}

    @abstractmethod
    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Multiply-accumulates for one sequence of `length` tokens, by part.

        Parts are `projections`, `experts` and `routers`. Counted is a forward in training or, if
        not, in evaluation, where tokens may take fewer experts.
        """

    @abstractmethod
    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Compute y of `forward` [B, S, D]; also return the routers' decisions, by their names."""

    @annotated("ffn")
    def forward(
        self,
        x: Tensor,
        router_input: Tensor,
        token_mask: Tensor | None,
        gathered: Gathered = NOTHING_GATHERED,
        trace: bool = False,
        state: TokenState = NO_STATE,
    ) -> FeedForwardOutput:
        """x [B, S, D], routed by `router_input` [B, S, D] -> y [B, S, D].

        Under peri-norm `router_input` is normalized and `x` the raw residual, elsewhere both are
        the same. `token_mask` [B, S] bool is true for real tokens; None when there is no padding,
        at which y has no part of routed experts. `state` is for routers.
        """
        y, routing = self.transform(x, router_input, FFNContext(token_mask, gathered, state))
        statistics = {name: decided.statistics for name, decided in routing.items()}
        states = recurrent_states(routing)
        return FeedForwardOutput(y, statistics, routing if trace else {}, states)


class DenseFeedForward(FeedForward):
    """`W_down act(W_up x)`, optionally gated, optionally with biases."""

    def __init__(self, config: DenseFFNConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        up = Normal(init_scale / math.sqrt(d_model))
        down, bias = Normal(init_scale / math.sqrt(config.d_ff)), config.bias
        self.up = Linear(d_model, config.d_ff, up, bias=bias)
        self.gate = Linear(d_model, config.d_ff, up, bias=bias) if config.gated else None
        self.down = Linear(config.d_ff, d_model, down, bias=bias)
        self.activation = ACTIVATIONS[config.activation].value

    @classmethod
    def like(cls, config: FFNConfig, d_ff: int, d_model: int, init_scale: float) -> Self:
        """Build one of hidden width `d_ff` with the activation, gate and biases of `config`."""
        dense = DenseFFNConfig(
            d_ff=d_ff, activation=config.activation, gated=config.gated, bias=config.bias
        )
        return cls(dense, d_model, init_scale)

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Implement `FeedForward.macs`."""
        return {"projections": sum(p.macs(length) for p in (self.up, self.gate, self.down) if p)}

    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Implement `FeedForward.transform`; only `x` is used."""
        hidden = self.activation(self.up(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.down(hidden), {}


class OutputBiases(nn.Module):
    """Biases of the experts' outputs, weighted like these: dense, as all experts' are small."""

    def __init__(self, num_experts: int, d_model: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(num_experts, d_model))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter."""
        return {"value": Constant(0.0)}

    def macs(self, num_tokens: int) -> int:
        """Count multiply-accumulates for so many tokens."""
        return num_tokens * self.value.numel()

    def forward(self, routing: Routing) -> Tensor:
        """Sum the biases of each token's experts by its weights: [T, D]."""
        weights = routing.topk_weights
        if routing.keep_mask is not None:
            weights = weights * routing.keep_mask
        of_experts = weights.new_zeros(len(weights), len(self.value)).scatter_add(
            1, routing.topk_ids.flatten(1), weights.flatten(1)
        )
        return of_experts.to(self.value.dtype) @ alias(self.value)


class SharedExpert(nn.Module):
    """An expert that every token uses, weighed by a sigmoid if so configured."""

    def __init__(self, config: MoEFFNConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        assert config.shared_expert is not None
        d_ff = config.shared_expert.d_expert
        self.ffn = DenseFeedForward.like(config, d_ff, d_model, init_scale)
        init = Normal(init_scale / math.sqrt(d_model))
        gated = config.shared_expert.sigmoid_gate
        self.gate = RouterLogits(d_model, 1, init) if gated else None

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Count multiply-accumulates as `FeedForward.macs` does."""
        gate = 0 if self.gate is None else length * self.gate.weight.numel()
        return {**self.ffn.macs(length, training=training), "routers": gate}

    def forward(self, x: Tensor, router_input: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        y = self.ffn(x, router_input, None).y
        return y if self.gate is None else y * self.gate(router_input).sigmoid().to(y.dtype)


class MoEFeedForward(RoutedModule, FeedForward):
    """`y = sum over chosen e of w_e W_down^e act(W_up^e x)`, optionally gated.

    sigma-MoE (Csordas et al. 2023, arXiv 2310.10837, equations 10-12) with sigmoid scores
    and raw gates; the usual mixture of experts with softmax scores. A bias of hidden units is a
    weight of one more input, which is 1; biases of outputs are summed where the token is.
    """

    def __init__(self, config: MoEFFNConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        E, d_expert = config.router.num_experts, config.d_expert
        std = init_scale / math.sqrt(d_model)
        self.router = make_router(config.router, d_model, init=Normal(std, equal_rows=True))
        d_in = d_model + config.bias
        up = LastRowZero(Normal(std)) if config.bias else Normal(std)
        self.up = GroupedLinear(E, d_in, d_expert, up)
        self.gate = GroupedLinear(E, d_in, d_expert, up) if config.gated else None
        # The fan-in counts all experts, not the chosen ones (MoEUT's released code).
        self.down = GroupedLinear(
            E, d_expert, d_model, Normal(init_scale / math.sqrt(E * d_expert))
        )
        self.down_bias = OutputBiases(E, d_model) if config.bias else None
        has_shared = config.shared_expert is not None
        self.shared = SharedExpert(config, d_model, init_scale) if has_shared else None
        self.bias = Bias(d_model) if config.output_bias else None

    def routers(self) -> dict[str, Router]:
        """The only router."""
        return {"": self.router}

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        """Implement `FeedForward.macs`."""
        per_row = sum(p.macs_per_row() for p in (self.up, self.gate, self.down) if p)
        biases = self.down_bias.macs(length) if self.down_bias else 0
        chosen = self.config.router.experts_per_token(training).mean
        parts = {
            "experts": length * chosen * per_row + biases,
            "routers": self.router.macs(length),
        }
        if self.shared is None:
            return parts
        return dict(Counter(parts) + Counter(self.shared.macs(length, training=training)))

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        return [
            RoutedProjection(
                "router",
                tuple(self.expert_layers()),
                "token",
                self.up.d_in,
                "token",
                self.down.d_out,
                weighted=True,
            )
        ]

    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Implement `FeedForward.transform`."""
        routing = self.router(router_input, context.token_mask, state=context.state.of(""))
        plan = self.dispatcher.plan(routing, self.router.num_experts)
        experts = self.expert_weights(
            *self.expert_layers(), gathered=context.gathered, activation=self.config.activation
        )
        rows = x.flatten(0, 1)
        sent = plan.dispatch(F.pad(rows, (0, 1), value=1.0) if self.config.bias else rows, "token")
        # The shared expert is computed while rows are in flight.
        shared = None if self.shared is None else self.shared(x, router_input)
        y = plan.run_and_combine(experts, sent, "token", "token", weighted=True).wait().view_as(x)
        if shared is not None:
            y = y + shared
        if self.down_bias is not None:
            y = y + self.down_bias(routing).view_as(y)
        if self.bias is not None:
            y = self.bias(y)
        return y, {"": routing}
