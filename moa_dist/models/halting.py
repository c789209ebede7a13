"""Halting: tokens leave layers that repeat at different depths (Sparse Universal Transformer).

Tan et al. 2023 (arXiv 2310.07096, section 3.3; code shawntan/SUT). Before every application but the
first, a gate halts a token with some probability. What other tokens see of it is the mean of its
states, each weighted by the probability that the token halted there, the last one by the
probability that it still runs. That mean flows from layer to layer; the state that is computed on
is handed on next to it.

Shapes: B sequences of S tokens, D model width, R applications.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa_dist.config.halting import HaltingConfig, StickBreakingHaltingConfig
from moa_dist.moe.initialize import Constant, Normal
from moa_dist.moe.mlp_router import MLPLogits
from moa_dist.moe.token_state import sum_and_number


class HaltingState(NamedTuple):
    """What is known of each token, in fp32 or wider but for `inner` and `halted`."""

    inner: Tensor
    """[B, S, D], the state that layers compute on, also of tokens that have halted."""
    halted: Tensor
    """[B, S, D], sum of the states at which a token may have halted, weighted by probability."""
    survival: Tensor
    """[B, S], probability not to have halted; carries a gradient."""
    expected: Tensor
    """[B, S], sum of these probabilities before the last decision; carries a gradient."""
    running: Tensor
    """[B, S] bool, false for tokens that take no expert any more, and for padding."""
    applications: Tensor
    """[B, S] int64, how many a token has taken, up to this one."""

    @property
    def weight(self) -> Tensor:
        """[B, S], `survival` of running tokens, 0 for others."""
        return self.survival * self.running

    def choice(self) -> Tensor:
        """Return what a second pass over the same tokens must not decide again."""
        return self.running


class Halting(nn.Module, ABC):
    """Decides before each application of a layer which tokens run, built from its section."""

    gate: nn.Module
    """Has the parameters, which all applications of a layer share."""

    @abstractmethod
    def macs(self, num_tokens: int) -> int:
        """Count multiply-accumulates of one decision for each token."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        past: HaltingState | None,
        choice: Tensor | None = None,
    ) -> HaltingState:
        """Decide before an application which tokens run; `past` is None before the first.

        x [B, S, D] is what others see of tokens; `token_mask` [B, S] bool is true for real ones.
        With a `choice`, see `HaltingState.choice`, only probabilities are computed.
        """

    @abstractmethod
    def losses(
        self, state: HaltingState, token_mask: Tensor | None, num_applications: int
    ) -> dict[str, Tensor]:
        """Compute losses by name, coefficients applied, by the state after the last application."""


class StickBreakingHalting(Halting):
    """The gate of a layer: the probability that a token halts, by its state."""

    def __init__(self, config: StickBreakingHaltingConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        init = Normal(1 / math.sqrt(d_model))
        self.gate = MLPLogits(d_model, config.d_hidden or d_model, 2, "gelu", init)
        self.gate.out.init = Constant(0.0)  # halting is as likely as not at first

    def macs(self, num_tokens: int) -> int:
        """Implement `Halting.macs`."""
        return num_tokens * sum(w.numel() for w in self.gate.parameters() if w.dim() == 2)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        past: HaltingState | None,
        choice: Tensor | None = None,
    ) -> HaltingState:
        """Implement `Halting.forward`."""
        if past is None:
            return self._first(x, token_mask)
        go_on, halt = self.gate(past.inner).softmax(-1).unbind(-1)
        survival = past.survival * go_on
        running = choice
        if running is None:
            running = past.running & (survival.detach() >= 1 - self.config.threshold)
        now = (past.survival * halt)[..., None].to(x.dtype)
        return HaltingState(
            past.inner,
            past.halted + now * past.inner,
            survival,
            past.expected + past.survival,
            running,
            past.applications + running,
        )

    def _first(self, x: Tensor, token_mask: Tensor | None) -> HaltingState:
        one = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        running = torch.ones_like(one, dtype=torch.bool) if token_mask is None else token_mask
        return HaltingState(
            x, torch.zeros_like(x), one, torch.zeros_like(one), running, running.long()
        )

    def losses(
        self, state: HaltingState, token_mask: Tensor | None, num_applications: int
    ) -> dict[str, Tensor]:
        """Implement `Halting.losses`: the loss on depth.

        The mean runs over real tokens of each sequence, then over sequences.
        """
        if not self.config.loss:
            return {}
        means = depth = expected_depth(state, num_applications)
        if token_mask is not None:
            means = (depth * token_mask).sum(1) / token_mask.sum(1).clamp(min=1)
        return {"depth": self.config.loss * means.mean()}


def left(x: Tensor, inner: Tensor, state: HaltingState) -> tuple[Tensor, HaltingState]:
    """Return what others see of tokens after an application [B, S, D], and the state after it.

    `inner` [B, S, D] is the application's result; x is what others have seen so far, which stays
    for tokens that do not run.
    """
    seen = state.halted + state.weight[..., None].to(inner.dtype) * inner
    return seen.where(state.running[..., None], x), state._replace(inner=inner)


def expected_depth(state: HaltingState, num_applications: int) -> Tensor:
    """Return the expected number of applications after the first [B, S], by the last state.

    As in the released code: a token that has almost certainly halted, but not at any application,
    counts as if it took none.
    """
    last, R = state.survival, num_applications
    return state.expected - 1 - (R - 2) * last + (R - 1) * state.weight


def token_sums(state: HaltingState, token_mask: Tensor | None) -> dict[str, Tensor]:
    """Sum up how many applications tokens took, as `LanguageModelOutput.token_sums` has it."""
    return {"halting/applications": sum_and_number(state.applications, token_mask)}


HALTING: dict[type[HaltingConfig], Callable[[Any, int], Halting]] = {
    StickBreakingHaltingConfig: StickBreakingHalting,
}
"""Module by section."""


def make_halting(config: HaltingConfig, d_model: int) -> Halting:
    """Build the module that `config` describes."""
    return HALTING[type(config)](config, d_model)
