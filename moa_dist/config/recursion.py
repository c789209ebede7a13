"""How tokens choose their number of repeats of shared layers (Mixture-of-Recursions)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat

from moa_dist.config.routers import BalanceConfig, RouterConfig
from moa_dist.config.section import Kind
from moa_dist.errors import Problem


class RecursionConfig(Kind):
    """The family of choices. A recursion is one application of all layers that repeat."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    @property
    def looks_ahead(self) -> str | None:
        """Why a token may depend on later ones; None if it does not."""
        return None

    def routers(self, num_recursions: int) -> dict[str, RouterConfig]:
        """Routers whose experts are depths, by their path in this section."""
        return {}

    @abstractmethod
    def lengths(self, num_recursions: int, length: int) -> list[int]:
        """Tokens of a sequence of `length` in each recursion, in the mean for an even choice."""

    def rows_kept(self, num_recursions: int, length: int) -> int:
        """Rows [D] of a sequence kept for the backward pass by choosing and weighing alone."""
        return sum(self.lengths(num_recursions, length))

    def problems(self, path: str, num_recursions: int) -> Iterable[Problem]:
        """Report what is wrong within this section, which is found at `path`."""
        return ()

    def shrink(self, num_recursions: int) -> Self:
        """A copy for fewer recursions; see `moa_dist.config.shrink`."""
        return self


class ExpertChoiceConfig(RecursionConfig):
    """Each recursion takes the tokens with the largest logits among those of the one before it."""

    kind: Literal["expert_choice"] = "expert_choice"
    """Names this kind."""
    capacity: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    """Share of each sequence's tokens in each recursion, rounded down to whole tokens, at least
    one; it must not grow."""
    score: Literal["sigmoid", "tanh", "identity"] = "sigmoid"
    """Function that turns a logit into the weight of a recursion's result."""
    scale: PositiveFloat = 0.1
    """Multiplies all weights (alpha of the paper)."""
    sampling: NonNegativeFloat = 0.001
    """Coefficient of the binary cross-entropy of each logit and whether its token was taken."""
    separate_sampler: bool = False
    """Compute that loss of logits of their own, which see the tokens without gradient, so that it
    trains these alone (`aux_router` of the code)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the mean squared logit."""

    @property
    def looks_ahead(self) -> str:
        """Why a token may depend on later ones."""
        return (
            "expert choice compares a token with the later ones of its sequence to decide how "
            "often it recurs (`model.recursion.kind`)"
        )

    def lengths(self, num_recursions: int, length: int) -> list[int]:
        """Tokens of a sequence without padding in each recursion."""
        return [max(1, int(share * length)) for share in self.capacity]

    def rows_kept(self, num_recursions: int, length: int) -> int:
        """Results that are weighed, and the tokens among which each recursion chose."""
        lengths = self.lengths(num_recursions, length)
        return sum(lengths) + sum((length, *lengths[:-1]))

    def problems(self, path: str, num_recursions: int) -> Iterable[Problem]:
        """A share for each recursion, none of which may exceed the one before it."""
        if len(self.capacity) != num_recursions:
            yield Problem(
                f"`{path}.capacity` has {len(self.capacity)} shares, but layers repeat "
                f"{num_recursions} times; give one for each",
                (f"{path}.capacity", "model.num_layers", "model.num_distinct_layers"),
            )
        if list(self.capacity) != sorted(self.capacity, reverse=True):
            yield Problem(
                f"`{path}.capacity` grows, but a recursion takes its tokens from the one before it",
                (f"{path}.capacity",),
            )
        if self.separate_sampler and not self.sampling:
            yield Problem(
                f"`{path}.separate_sampler` has no effect with `{path}.sampling` 0; remove it",
                (f"{path}.separate_sampler", f"{path}.sampling"),
            )

    def shrink(self, num_recursions: int) -> Self:
        """Drop the last shares."""
        return self.changed(capacity=self.capacity[:num_recursions])


class TokenChoiceConfig(RecursionConfig):
    """A router chooses the depth of each token once, as other routers choose experts."""

    kind: Literal["token_choice"] = "token_choice"
    """Names this kind."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns logits into scores, the largest of which chooses."""
    scale: PositiveFloat = 1.0
    """Multiplies the score that weighs the last recursion's result (alpha of the paper)."""
    balance: BalanceConfig = BalanceConfig()
    """Losses and bias that spread tokens over depths."""

    def routers(self, num_recursions: int) -> dict[str, RouterConfig]:
        """The router, whose expert e stands for e + 1 recursions."""
        router = RouterConfig(
            num_experts=num_recursions,
            top_k=1,
            score=self.score,
            route_scale=self.scale,
            balance=self.balance,
        )
        return {"recursion": router}

    def lengths(self, num_recursions: int, length: int) -> list[int]:
        """Tokens in each recursion, if equally many stop at each depth."""
        return [-(-length * (num_recursions - r) // num_recursions) for r in range(num_recursions)]
