"""A stack of layers, distinct or shared: G layers applied R times in the order ABAB...

MoEUT's layer grouping (Csordas et al. 2024, section 2.1); G = num_layers is the usual stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moa_dist.config.model import ModelConfig
from moa_dist.kernels.gradient_sum import Repeats
from moa_dist.models.block import Block, BlockOutput, EncoderMemory, GatheredExperts
from moa_dist.models.cache import KeyValues
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.recompute import recomputed
from moa_dist.models.trace import BlockTrace
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingStatistics

RouterKey = tuple[int, str]
"""Identifies a router: its distinct layer, and its name within the layer."""


LayerCall = tuple[int, int]
"""Identifies one application of a layer: the distinct layer, and the repeat."""


class RouterCall(NamedTuple):
    """Identifies one application of a router."""

    layer: int
    """Distinct layer, 0 ... G - 1; in a model that translates, the decoder's are G ... 2 G - 1,
    after the encoder's."""
    repeat: int
    """Repeat of that layer, 0 ... R - 1."""
    router: str
    """Name of the router within the layer, such as `ffn`."""

    @property
    def key(self) -> RouterKey:
        """The router, which is the same for all repeats of a layer."""
        return self.layer, self.router


class StackOutput(NamedTuple):
    """Result of all layers."""

    x: Tensor
    """[B, S, D]."""
    statistics: dict[RouterCall, RoutingStatistics]
    """One entry per router application."""
    cache: tuple[KeyValues, ...] | None = None
    """One entry per application of a layer, with new keys and values; None if none was given."""
    traces: dict[LayerCall, BlockTrace] | None = None
    """By application of a layer, numbered as in `RouterCall`; None unless traces were requested."""


class LayerStack(nn.Module):
    """Applies `num_distinct_layers` blocks in turn until `num_layers` have been applied."""

    def __init__(
        self, config: ModelConfig, *, recompute: bool = False, cross: bool = False
    ) -> None:
        """Build the blocks; with `cross` they also attend to an encoder of the same depth."""
        super().__init__()
        num_distinct = config.num_distinct_layers or config.num_layers
        if config.num_layers % num_distinct:
            raise ValueError(
                f"{num_distinct} distinct layers do not divide {config.num_layers} layers"
            )
        self.num_repeats = config.num_layers // num_distinct
        self.first_layer = num_distinct if cross else 0
        self.layers = nn.ModuleList([Block(config, cross=cross) for _ in range(num_distinct)])
        self.recompute = recompute
        self._compiled: tuple[nn.Module, ...] | None = None

    def compile_blocks(self, **options: Any) -> None:
        """Compile blocks for training, each as one graph; `options` are those of `torch.compile`.

        Blocks of equal shapes share their code. Evaluation, whose shapes vary, runs uncompiled.
        """
        self._compiled = tuple(
            cast(nn.Module, torch.compile(layer, fullgraph=True, dynamic=False, **options))
            for layer in self.blocks()
        )

    def routers(self) -> dict[RouterKey, Router]:
        """All routers, each of which is applied once per repeat."""
        return {
            (self.first_layer + i, name): router
            for i, layer in enumerate(self.blocks())
            for name, router in layer.routers().items()
        }

    def macs(self, length: int) -> dict[str, int]:
        """Count multiply-accumulates of all layers over a sequence of `length`, by part."""
        parts: Counter[str] = Counter()
        for application in range(self.num_repeats * len(self.layers)):
            layer = cast(Block, self.layers[application % len(self.layers)])
            parts += Counter(layer.macs(length, application))
        return dict(parts)

    def forward(
        self,
        x: Tensor,
        masks: LayerMasks,
        cache: tuple[KeyValues, ...] | None = None,
        memory: EncoderMemory | None = None,
        trace: bool = False,
    ) -> StackOutput:
        """x [B, S, D] -> x [B, S, D]; `cache` has an entry per application of a layer."""
        statistics = {}
        traces = {}
        extended: list[KeyValues] = []
        # Gathers of expert weights start for all layers at once and are awaited at first use, so
        # that they overlap with the computation of earlier layers.
        blocks = list(self.blocks())
        pending = [layer.gather_experts() for layer in blocks]
        gathered: list[GatheredExperts] = []
        repeats: list[Repeats] = []
        for repeat in range(self.num_repeats):
            for i in range(len(self.layers)):
                if repeat == 0:
                    gathered.append(pending[i].wait())
                    weights = blocks[i].weights(gathered[i])
                    repeats.append(Repeats(weights, self.num_repeats))
                application = repeat * len(self.layers) + i
                past = None if cache is None else cache[application]
                mask = masks.of(application)
                output = self._apply_layer(i, repeats[i], x, mask, gathered[i], past, memory, trace)
                x = output.x
                if output.cache is not None:
                    extended.append(output.cache)
                for router, value in output.statistics.items():
                    statistics[RouterCall(self.first_layer + i, repeat, router)] = value
                if output.trace is not None:
                    traces[self.first_layer + i, repeat] = output.trace
        longer = None if cache is None else tuple(extended)
        return StackOutput(x, statistics, longer, traces if trace else None)

    def blocks(self) -> Iterable[Block]:
        """The distinct layers, in the order in which they are applied."""
        return cast(Iterable[Block], self.layers)

    def _apply_layer(
        self,
        index: int,
        repeats: Repeats,
        x: Tensor,
        mask: AttentionMask,
        gathered: GatheredExperts,
        cache: KeyValues | None,
        memory: EncoderMemory | None,
        trace: bool,
    ) -> BlockOutput:
        layer, rest = self.layers[index], (cache, memory, trace)
        if self.recompute and torch.is_grad_enabled():
            return recomputed(layer, repeats, x, mask, gathered.map(repeats.detached), *rest)
        if self._compiled is None or not (torch.is_grad_enabled() and self.training) or trace:
            with repeats.summing():
                return layer(x, mask, gathered.map(repeats.detached), *rest)
        compiled, alias = self._compiled[index], repeats.aliases()
        weights = {name: alias.get(weight, weight) for name, weight in compiled.named_parameters()}
        gathered = gathered.map(lambda weight: alias.get(weight, weight))
        return functional_call(compiled, weights, (x, mask, gathered, *rest))
