"""In-flight tensors, so a layer can overlap communication with compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Pending(NamedTuple):
    """A tensor whose data may still be in flight."""

    buffer: Tensor
    """Receives the data; must not be read before `wait`."""
    finish: Callable[[Tensor], Tensor]
    """Waits for the data and turns the buffer into the result."""

    def wait(self) -> Tensor:
        """Wait for the data and return the tensor. Call it once."""
        return self.finish(self.buffer)

    def then(self, function: Callable[[Tensor], Tensor]) -> Pending:
        """Return a pending tensor to which `function` is applied after the wait."""
        return Pending(self.buffer, lambda buffer: function(self.finish(buffer)))


def ready(x: Tensor) -> Pending:
    """Wrap a tensor that is already available."""
    return Pending(x, lambda buffer: buffer)
