"""What a checkpoint needs to know of whoever trains: the one door between files and engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one tensor."""

    parameter: str
    """Name of the parameter, or buffer, in the model."""
    state: str
    """`master`, or a moment of the optimizer such as `exp_avg`."""
    start: int
    """First element, in the flattened global parameter."""
    view: Tensor
    """1-D view of the live values."""


class StateSource(Protocol):
    """State of a model and its optimizer, spread over ranks in any layout.

    Every rank holds flat ranges of tensors, named in coordinates of the whole, unsharded ones.
    Together the fragments of all ranks are the whole state.
    """

    @property
    def device(self) -> torch.device:
        """Where this rank's values are."""

    def fragments(self, *, owned_only: bool) -> Iterator[Fragment]:
        """Iterate over all fragments on this rank; with `owned_only`, each is on one rank only."""

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter and buffer of the whole, unsharded model."""

    def num_updates(self) -> int:
        """Count the updates that the optimizer made so far."""

    def make_optimizer_state(self, num_updates: int) -> None:
        """Create what moments are missing, zero, as after so many updates."""

    def publish_masters(self) -> None:
        """Bring the model's parameters in line with overwritten masters. Collective."""
