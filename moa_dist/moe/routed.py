"""What attention and FFN layers with experts have in common.

Parallelism is applied to such a module from outside: its dispatcher sends rows to the ranks of
their experts, or its experts' weights are gathered here. Its forward reads the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from moa_dist.moe.dispatch import Dispatcher, LocalDispatcher
from moa_dist.moe.experts import GroupedLinear

Gathered = Mapping[str, Tensor]
"""Weights [E, d_in, d_out] of all experts, by the name of their `GroupedLinear` in its module;
empty where tokens travel instead of weights."""

NOTHING_GATHERED: Gathered = MappingProxyType({})
"""For modules whose experts are all here."""


class RoutedModule(nn.Module):
    """A module whose children include `GroupedLinear`s, perhaps sharded over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher = LocalDispatcher()

    def gather_experts(self) -> dict[str, Tensor]:
        """Weights that travel: called once per forward and used by every repeat of a layer."""
        return {
            name: child()
            for name, child in self.named_children()
            if isinstance(child, GroupedLinear) and child.gather is not None
        }

    def matrices(self, name: str, gathered: Gathered) -> Tensor:
        """Weights [E, d_in, d_out] of the `GroupedLinear` called `name`: all, or this rank's."""
        if name in gathered:
            return gathered[name]
        layer = self.get_submodule(name)
        assert isinstance(layer, GroupedLinear)
        return layer.weight
