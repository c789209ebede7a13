"""Tensors under way: what a layer may compute beside, without knowing who sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Pending(NamedTuple):
    """A tensor that may still be under way."""

    buffer: Tensor
    """What it arrives in; not to be read before."""
    finish: Callable[[Tensor], Tensor]
    """Waits, and makes the tensor of the buffer."""

    def wait(self) -> Tensor:
        """The tensor. To be called once."""
        return self.finish(self.buffer)

    def then(self, function: Callable[[Tensor], Tensor]) -> Pending:
        """What `function` makes of it, once it is here."""
        return Pending(self.buffer, lambda buffer: function(self.finish(buffer)))


def ready(x: Tensor) -> Pending:
    """A tensor that need not travel."""
    return Pending(x, lambda buffer: buffer)
