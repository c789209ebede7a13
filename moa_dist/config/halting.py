"""How many of the layers that repeat a token takes, if not all of them.

A new kind is a subclass of `HaltingConfig`, a module, and a line in `moa_dist.models.halting`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from moa_dist.config.section import Kind


class HaltingConfig(Kind):
    """The family of ways in which tokens leave the layers between prelude and coda early."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}


class StickBreakingHaltingConfig(HaltingConfig):
    """Each application halts a token with some probability (Sparse Universal Transformer).

    A token's result is the mean of its states, weighted by the probability to halt at each. It is
    computed no further once it has almost certainly halted.
    """

    kind: Literal["stick_breaking"] = "stick_breaking"
    """Names this kind."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Probability of having halted beyond which a token takes no expert."""
    loss: NonNegativeFloat = 0.0
    """Coefficient of the loss on depth: the expected number of applications after the first, a mean
    over tokens of a sequence, then over sequences."""
    d_hidden: PositiveInt | None = None
    """Width of the hidden layer that decides; null for that of the model."""
