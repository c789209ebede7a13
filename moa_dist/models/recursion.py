"""Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524): tokens choose how often they recur.

A recursion is one application of all layers that repeat, to the tokens that still recur, packed.
Equal to the authors' code (raymin0223/mixture_of_recursions) in both kinds.

Shapes: B sequences of S tokens, of which n are packed, D model width, R recursions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.recursion import ExpertChoiceConfig, RecursionConfig, TokenChoiceConfig
from moa_dist.models.packing import Places
from moa_dist.moe.initialize import Normal
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_logits import RouterLogits

Run = Callable[[int, Tensor, Places | None], Tensor]
"""Applies a recursion, counted from 0, to packed tokens [B, n, D]; without places, to all."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda logits: logits,
}
"""Logits to weights, by `ExpertChoiceConfig.score`."""


class RecursionOutput(NamedTuple):
    """Result of all recursions."""

    x: Tensor
    """[B, S, D]."""
    depth: Routing | None
    """The router's choice of depths, whose expert e stands for e + 1 recursions; None without a
    router."""
    losses: dict[str, Tensor]
    """Scalars by name, coefficients applied, besides those of a router's statistics."""

    def token_sums(self) -> dict[str, Tensor]:
        """Sum up how often tokens recur, as `LanguageModelOutput.token_sums` has it.

        Nothing for expert choice, which takes a set share of the tokens.
        """
        if self.depth is None:
            return {}
        load = self.depth.statistics.load.sum((0, 1))
        recursions = torch.arange(1, len(load) + 1, device=load.device)
        return {"depth/recursions": torch.stack([(load * recursions).sum(), load.sum()])}


class Recursion(nn.Module, ABC):
    """Chooses how often each token recurs, applies the layers, and weighs their results."""

    def __init__(self, config: RecursionConfig, num_recursions: int) -> None:
        super().__init__()
        self.router: Router | None = None
        """Router of depths, if this kind has one."""
        self.num_recursions = num_recursions
        """Most recursions of a token (R)."""
        self._lengths = config.lengths

    def lengths(self, length: int) -> list[int]:
        """Return how many of a sequence's `length` tokens each recursion computes, on average."""
        return self._lengths(self.num_recursions, length)

    @abstractmethod
    def macs(self, length: int) -> int:
        """Count multiply-accumulates of the choice in a sequence of `length`."""

    @abstractmethod
    def forward(self, x: Tensor, token_mask: Tensor | None, run: Run) -> RecursionOutput:
        """x [B, S, D] -> x [B, S, D]; `token_mask` [B, S] bool is false at padding."""


class ExpertChoice(Recursion):
    """Each recursion adds its weighted result to the tokens with the largest logits.

    It sees the whole sequence. Padding is never taken, nor counted.
    """

    def __init__(self, config: ExpertChoiceConfig, num_recursions: int, d_model: int) -> None:
        super().__init__(config, num_recursions)
        self.config = config

        def logits() -> nn.ModuleList:
            init = Normal(1 / math.sqrt(d_model))
            return nn.ModuleList(RouterLogits(d_model, 1, init) for _ in range(num_recursions))

        self.logits = logits()
        self.samplers = logits() if config.separate_sampler else None

    def macs(self, length: int) -> int:
        """Implement `Recursion.macs`: each recursion chooses among the tokens of the one before."""
        per_token = sum(weight.numel() for weight in self.parameters()) // self.num_recursions
        return per_token * sum((length, *self.lengths(length)[:-1]))

    def forward(self, x: Tensor, token_mask: Tensor | None, run: Run) -> RecursionOutput:
        """Implement `Recursion.forward`."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        real = candidates = real if token_mask is None else token_mask
        h, places = x, None
        losses: dict[str, Tensor] = {}
        lengths = self.lengths(x.shape[1])
        for r, (share, num) in enumerate(zip(self.config.capacity, lengths, strict=True)):
            logit = self.logits[r](h).squeeze(-1)
            kept = _largest(logit.detach(), candidates, _whole_tokens(real, share), num)
            sampled = logit
            if self.samplers is not None:
                sampled = self.samplers[r](h.detach()).squeeze(-1)
            for name, loss in self._losses(logit, sampled, candidates, kept).items():
                losses[name] = losses[name] + loss if name in losses else loss
            here = Places.of(kept, num, is_full=token_mask is None)
            places, h, candidates = here.within(places), here.take(h), here.held()
            weight = here.take(self.config.scale * SCORES[self.config.score](logit)) * candidates
            added = (weight[..., None] * run(r, h, places)).to(h.dtype)
            h, x = h + added, places.add(x, added)
        return RecursionOutput(x, None, losses)

    def _losses(
        self, logit: Tensor, sampled: Tensor, candidates: Tensor, kept: Tensor
    ) -> dict[str, Tensor]:
        """Return means over candidates, then over sequences; all arguments are [B, n]."""
        entropy = F.binary_cross_entropy_with_logits(sampled, kept.to(sampled), reduction="none")
        losses = {
            "depth/sampling": (self.config.sampling, entropy),
            "depth/z_loss": (self.config.z_loss, logit.square()),
        }
        count = candidates.sum(1).clamp(min=1)
        return {
            name: coefficient * ((loss * candidates).sum(1) / count).mean()
            for name, (coefficient, loss) in losses.items()
            if coefficient
        }


def _whole_tokens(real: Tensor, share: float) -> Tensor:
    """Return how many tokens of each sequence [B] a share is, at least one if it has any."""
    num = real.sum(1)
    return (num.double() * share).long().clamp(min=1).minimum(num)


def _largest(logit: Tensor, candidates: Tensor, num: Tensor, most: int) -> Tensor:
    """Return which candidates [B, n] have the `num` [B] largest logits, at most `most`.

    Of equal ones the first are taken.
    """
    order = logit.masked_fill(~candidates, -math.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(most, device=num.device) < num[:, None]
    return torch.zeros_like(candidates).scatter(1, order[:, :most], first)


class TokenChoice(Recursion):
    """A router chooses each token's depth; its weighted last result is added to the first input.

    The host waits once for how many tokens each recursion has.
    """

    def __init__(self, config: TokenChoiceConfig, num_recursions: int, d_model: int) -> None:
        super().__init__(config, num_recursions)
        (router,) = config.routers(num_recursions).values()
        self.router = Router(router, d_model)

    def macs(self, length: int) -> int:
        """Implement `Recursion.macs`."""
        assert self.router is not None
        return self.router.macs(length)

    def forward(self, x: Tensor, token_mask: Tensor | None, run: Run) -> RecursionOutput:
        """Implement `Recursion.forward`."""
        assert self.router is not None
        routing = self.router(x, token_mask)
        depth, weight = (
            part.view(x.shape[:2]) for part in (routing.topk_ids, routing.topk_weights)
        )
        if token_mask is not None:
            depth = depth.masked_fill(~token_mask, -1)
        later = torch.arange(1, self.num_recursions, device=x.device)
        most = longest(depth >= later[:, None, None])
        h, places = run(0, x, None), None
        y = x + (weight * (depth == 0))[..., None].mul(h).to(x.dtype)
        for r, num in enumerate(most, start=1):
            # At least one place, as all ranks must take part in what layers exchange.
            here = Places.of(depth >= r, max(num, 1), is_full=False)
            places, h, weight = here.within(places), here.take(h), here.take(weight)
            depth = here.take(depth).masked_fill(~here.held(), -1)
            h = run(r, h, places)
            y = places.add(y, (weight * (depth == r))[..., None].mul(h).to(x.dtype))
        return RecursionOutput(y, routing, {})


def longest(kept: Tensor) -> list[int]:
    """Return the most tokens of any sequence in each recursion, of those `kept` [R, B, S].

    The host waits for them.
    """
    most: list[int] = kept.sum(2).amax(1).tolist()
    return most


RECURSIONS: dict[type[RecursionConfig], Callable[[Any, int, int], Recursion]] = {
    ExpertChoiceConfig: ExpertChoice,
    TokenChoiceConfig: TokenChoice,
}
"""Module by section."""


def make_recursion(config: ModelConfig) -> Recursion | None:
    """Build what chooses depths; None where all tokens recur equally often."""
    section = config.recursion
    if section is None:
        return None
    return RECURSIONS[type(section)](section, config.num_repeats, config.d_model)
