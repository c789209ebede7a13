"""What layers hand on about each token next to its vector: a value, empty in most models.

A token's state depends on that token's own vectors, so it is the same in any layout. It lives for
one forward: a cache does not hold it, as later tokens see earlier ones by keys and values only.

Shapes: B sequences of S tokens, D model width, R width of a recurrent state.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moa_dist.models.halting import HaltingState
from moa_dist.moe.token_state import NO_STATE, TokenState


class LayerState(NamedTuple):
    """State that a layer takes from the one before."""

    halting: HaltingState | None = None
    """Which tokens are still computed; None where all are."""
    routers: dict[str, Tensor] | None = None
    """[B, S, R] states of recurrent routers, by their names within a layer; None without any."""
    tasks: Tensor | None = None
    """[B] int64, the task of each sequence, which no layer changes; None if it is not known."""

    def of_routers(self, part: str, weight: Tensor | None) -> TokenState:
        """Select what the routers of a part know, with the `weight` [B, S] of tokens."""
        if weight is None and self.routers is None and self.tasks is None:
            return NO_STATE
        past = {
            name.removeprefix(part).removeprefix("."): state
            for name, state in (self.routers or {}).items()
            if name == part or name.startswith(f"{part}.")
        }
        return TokenState(weight, past or None, self.tasks)

    def with_routers(self, states: dict[str, Tensor]) -> LayerState:
        """Replace the states of some routers."""
        return self._replace(routers=(self.routers or {}) | states) if states else self


EMPTY_STATE = LayerState()
