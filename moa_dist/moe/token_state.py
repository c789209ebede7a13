"""What routers know of tokens besides their vectors; nothing in most models.

Shapes: B sequences of S tokens, R width of a recurrent state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class RouterState(NamedTuple):
    """What one router knows."""

    weight: Tensor | None = None
    """[B, S], weight of each token in the sums of `RoutingStatistics` that carry gradients; None if
    all count once."""
    past: Tensor | None = None
    """[B, S, R] what the router of the layer before returned; None in the first one."""
    tasks: Tensor | None = None
    """[B] int64, the task of each sequence; None if it is not known."""


class TokenState(NamedTuple):
    """What the routers of one part of a layer know."""

    weight: Tensor | None = None
    """As in `RouterState`."""
    past: Mapping[str, Tensor] | None = None
    """States of recurrent routers by their names within the part; None if there are none."""
    tasks: Tensor | None = None
    """As in `RouterState`."""

    def of(self, router: str) -> RouterState:
        """Select what one router knows."""
        past = None if self.past is None else self.past.get(router)
        return RouterState(self.weight, past, self.tasks)


def sum_and_number(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Return the sum of `values` [B, S] over tokens, and the number of these: [2].

    `token_mask` bool is true for real ones. A mask of another shape is that of another text; all
    tokens count then.
    """
    if token_mask is None or token_mask.shape != values.shape:
        token_mask = torch.ones_like(values, dtype=torch.bool)
    return torch.stack([(values * token_mask).sum(), token_mask.sum()])


NO_STATE = TokenState()
NO_ROUTER_STATE = RouterState()
