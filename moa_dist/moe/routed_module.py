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

from moa_dist.distributed.pending import Pending
from moa_dist.moe.dispatch import Dispatcher, Level, LocalTokenDispatcher
from moa_dist.moe.experts import GroupedLinear

Gathered = Mapping[str, Tensor]
"""Weights [E, d_in, d_out] of all experts, by the name of their `GroupedLinear` in its module;
empty where tokens travel instead of weights."""

NOTHING_GATHERED: Gathered = MappingProxyType({})
"""For modules whose experts are all here."""


class RoutedProjection(NamedTuple):
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
        self.dispatcher: Dispatcher = LocalTokenDispatcher()

    @abstractmethod
    def routed_projections(self) -> list[RoutedProjection]:
        """What travels in one forward if tokens do, for those who count it."""

    def gather_experts(self) -> dict[str, Pending]:
        """Weights that travel: called once per forward and used by every repeat of a layer."""
        return {
            name: child()
            for name, child in self.named_children()
            if isinstance(child, GroupedLinear) and child.gather is not None
        }

    def expert_weights(self, name: str, gathered: Gathered) -> Tensor:
        """Weights [E, d_in, d_out] of the `GroupedLinear` called `name`: all, or this rank's."""
        if name in gathered:
            return gathered[name]
        layer = self.get_submodule(name)
        assert isinstance(layer, GroupedLinear)
        return layer.weight
