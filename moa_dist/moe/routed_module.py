"""What attention and FFN layers with experts have in common.

Parallelism is applied to such a module from outside: its dispatcher sends rows to the ranks of
their experts, or the weights of all experts are gathered on this rank. Its forward is the same
in both cases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from moa_dist.config.parts import Part
from moa_dist.kernels.gradient_sum import used_for
from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.moe.borrowing import borrowed
from moa_dist.moe.dispatch import Dispatcher, Level, LocalTokenDispatcher
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.router import Router, Routing

Gathered = Mapping[str, Tensor]
"""Weights [E, d_in, d_out] of all experts, by the name of their `GroupedLinear` in its module;
empty where tokens are exchanged instead of weights."""

NOTHING_GATHERED: Gathered = MappingProxyType({})
"""For modules that use the experts of this rank."""


class RoutedProjection(NamedTuple):
    """One round trip of rows to their experts and back in a module's forward."""

    router: str
    """Name, within the module, of the router whose plan the rows follow."""
    experts: tuple[str, ...]
    """Names, within the module, of the `GroupedLinear`s that multiply the rows; the last one makes
    the result, those before it the hidden rows."""
    read: Level
    """Level of the rows that are sent."""
    d_in: int
    """Width of the rows that are sent."""
    write: Level
    """Level of the rows that come back."""
    d_out: int
    """Width of the rows that come back."""
    weighted: bool
    """Whether the router weighs what comes back."""


class RoutedModule(nn.Module, ABC):
    """A module whose children include `GroupedLinear`s, perhaps sharded over ranks."""

    part: ClassVar[Part]
    """The part of a layer that this module implements, as the configuration calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher = LocalTokenDispatcher()

    @abstractmethod
    def routed_projections(self) -> list[RoutedProjection]:
        """List the round trips of one forward, in order, for counting and planning."""

    def router_of(self, projection: RoutedProjection) -> Router:
        """Return the router that a projection of this module follows."""
        router = self.get_submodule(projection.router)
        assert isinstance(router, Router)
        return router

    def expert_layers(self) -> dict[str, GroupedLinear]:
        """Return all expert tensors that this module uses, by name."""
        return self.held_expert_layers() or _grouped(borrowed(self))

    def held_expert_layers(self) -> dict[str, GroupedLinear]:
        """Return them unless they are borrowed: each expert tensor is held by one module."""
        return _grouped(self.named_children())

    def expert_weights(
        self, *names: str, gathered: Gathered, activation: str = "relu"
    ) -> ExpertWeights:
        """Return the weights of `GroupedLinear`s, of which the last one makes the result.

        They are those of all experts if they were gathered, else of this rank's experts.
        """
        layers = self.expert_layers()
        weights = ((name, layers[name].weight) for name in names)
        *ups, down = (
            used_for(weight, gathered[name]) if name in gathered else weight
            for name, weight in weights
        )
        return ExpertWeights(down, tuple(ups), activation)


def _grouped(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, GroupedLinear]:
    return {name: module for name, module in modules if isinstance(module, GroupedLinear)}


def routed_modules(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """Yield name and module of every part of `model` that has experts."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedModule):
            yield name, module


def recurrent_states(routings: Mapping[str, Routing]) -> dict[str, Tensor]:
    """Return what recurrent routers hand on to the next layer, by name."""
    return {name: r.state for name, r in routings.items() if r.state is not None}
