"""Expert weights that are gathered on every rank, once per forward, for all that use them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moa_dist.distributed.pending import Pending
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.routed_module import Gathered, RoutedModule


class ExpertGathering:
    """Gathers of one forward; empty where tokens are exchanged."""

    def __init__(self) -> None:
        self._pending: dict[GroupedLinear, Pending] = {}
        self._ready: dict[GroupedLinear, Tensor] = {}

    def start(self, module: nn.Module | None) -> None:
        """Start to gather the experts of `module`, unless another that uses them has done so."""
        for layer in _gathered_layers(module).values():
            if layer not in self._pending:
                self._pending[layer] = layer()

    def wait(self, module: nn.Module | None) -> Gathered:
        """Wait for the experts that `module` uses, and return them by their names in it."""
        layers = _gathered_layers(module)
        for layer in layers.values():
            if layer not in self._ready:
                self._ready[layer] = self._pending[layer].wait()
        return {name: self._ready[layer] for name, layer in layers.items()}


def _gathered_layers(module: nn.Module | None) -> Mapping[str, GroupedLinear]:
    if not isinstance(module, RoutedModule):
        return {}
    layers = module.expert_layers().items()
    return {name: layer for name, layer in layers if layer.gather is not None}
