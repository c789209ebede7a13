"""What attention and FFN layers with experts have in common.

Parallelism is applied to such a module from outside: its dispatcher sends rows to the ranks of
their experts, or its experts' weights are gathered here. Its forward reads the same for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from moa_dist.distributed.arriving import Arriving
from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.moe.dispatch import Dispatcher, Level, LocalDispatcher
from moa_dist.moe.experts import GroupedLinear

Gathered = Mapping[str, Tensor]
"""Weights [E, d_in, d_out] of all experts, by the name of their `GroupedLinear` in its module;
empty where tokens travel instead of weights."""

NOTHING_GATHERED: Gathered = MappingProxyType({})
"""For modules whose experts are all here."""


class Trip(NamedTuple):
    """Rows go to their experts and back, as a module's forward lets them."""

    router: str
    """Name of the router, within the module, whose plan they follow."""
    read: Level
    """What is sent: rows of this level ..."""
    d_in: int
    """... and width."""
    write: Level
    """What comes back."""
    d_out: int
    """Its width."""
    weighted: bool
    """The router weighs what comes back."""


class RoutedModule(nn.Module, ABC):
    """A module whose children include `GroupedLinear`s, perhaps sharded over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher = LocalDispatcher()

    @abstractmethod
    def trips(self) -> list[Trip]:
        """What travels in one forward if tokens do, for those who count it."""

    def gather_experts(self) -> dict[str, Arriving]:
        """Weights that travel: called once per forward and used by every repeat of a layer."""
        return {
            name: child.begin_gather()
            for name, child in self.named_children()
            if isinstance(child, GroupedLinear) and child.gather is not None
        }

    def apply_experts(
        self, name: str, rows: Tensor, counts: list[int], gathered: Gathered
    ) -> Tensor:
        """Rows [A, d_in] through the `GroupedLinear` called `name` -> [A, d_out]."""
        if name in gathered:
            return grouped_matmul(rows, gathered[name], counts)
        result: Tensor = self.get_submodule(name)(rows, counts)
        return result
