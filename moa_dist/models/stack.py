"""A stack of layers, distinct or shared: by default, G layers applied R times in the order ABAB...

MoEUT's layer grouping (Csordas et al. 2024, section 2.1); G = num_layers is the usual stack. Layers
before and after these are applied once. See `moa_dist.models.sharing` for sharing by part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moa_dist.config.model import ModelConfig
from moa_dist.config.recompute import Recompute, recomputed_parts
from moa_dist.kernels.gradient_sum import GradientSums, Repeats
from moa_dist.kernels.routed_experts import recomputed_experts
from moa_dist.models.block import Block, BlockOutput, EncoderMemory, GatheredExperts
from moa_dist.models.cache import KeyValues
from moa_dist.models.calls import LayerCall, PlannedLayer, RouterCall, RouterKey
from moa_dist.models.halting import token_sums
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.packing import Places
from moa_dist.models.recompute import Recomputation, recomputed
from moa_dist.models.recursion import Recursion, RecursionOutput, make_recursion
from moa_dist.models.sharing import make_layers
from moa_dist.models.state import EMPTY_STATE, LayerState
from moa_dist.models.trace import BlockTrace
from moa_dist.moe.borrowing import named_used_modules, used_modules
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.gathering import ExpertGathering
from moa_dist.moe.routed_module import RoutedModule
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.moe.token_state import sum_and_number


class StackOutput(NamedTuple):
    """Result of all layers."""

    x: Tensor
    """[B, S, D]."""
    statistics: dict[RouterCall, RoutingStatistics]
    """One entry per router application."""
    cache: tuple[KeyValues, ...] | None = None
    """One entry per application of a layer, with new keys and values; None if none was given."""
    traces: dict[LayerCall, BlockTrace] | None = None
    """By application of a layer; None unless traces were requested."""
    state: LayerState = EMPTY_STATE
    """What the last layer handed on next to x."""
    token_sums: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """What layers handed on, in numbers; see `LanguageModelOutput`."""
    recursion: RecursionOutput | None = None
    """What tokens chose that choose how often they recur; None where none do."""


class LayerStack(nn.Module):
    """Applies `num_layers` layers, some of which may be the same ones or share parts."""

    def __init__(
        self, config: ModelConfig, *, recompute: Recompute = False, cross: bool = False
    ) -> None:
        """Build the blocks; with `cross` they also attend to an encoder of the same depth."""
        super().__init__()
        blocks, order = make_layers(config, cross=cross)
        self.layers = nn.ModuleList(blocks)
        self.first_layer = len(blocks) if cross else 0
        self.plan = tuple(self._planned(order))
        """All applications, in order."""
        self.core = range(config.prelude, config.num_layers - config.coda)
        """Applications of layers between prelude and coda, which may repeat."""
        self.d_head = config.attention.d_head
        self.recursion = make_recursion(config)
        """Chooses how often each token passes through these; None where all do equally often."""
        self._shared = tuple((module, n) for module, n in self.applications().items() if n > 1)
        self.recompute = recomputed_parts(recompute)
        if "experts" in self.recompute:
            for module in self.modules():
                if isinstance(module, RoutedModule) and module.part not in self.recompute:
                    module.dispatcher = LocalTokenDispatcher(recomputed_experts)
        self._compiled: tuple[nn.Module, ...] | None = None

    def _planned(self, order: Iterable[int]) -> Iterator[PlannedLayer]:
        """Number all applications; routers, which blocks may share, are counted by themselves."""
        blocks, times = list(self.blocks()), Counter[Any]()
        keys: dict[Router, RouterKey] = {}
        for index in order:
            number, routers = self.first_layer + index, {}
            for name, router in blocks[index].routers().items():
                key = keys.setdefault(router, (number, name))
                routers[name] = RouterCall(key[0], times[router], key[1])
                times[router] += 1
            yield PlannedLayer(index, (number, times[index]), routers)
            times[index] += 1

    def compile_blocks(self, **options: Any) -> None:
        """Compile blocks for training, each as one graph; `options` are those of `torch.compile`.

        Blocks of equal shapes share their code. Evaluation, whose shapes vary, runs uncompiled.
        """
        self._compiled = tuple(
            cast(nn.Module, torch.compile(layer, fullgraph=True, dynamic=False, **options))
            for layer in self.blocks()
        )

    def routers(self) -> dict[RouterKey, Router]:
        """All routers, each of which may be applied several times."""
        routers = {
            call.key: router
            for layer in self.plan
            for call, router in zip(
                layer.routers.values(), self.block(layer).routers().values(), strict=True
            )
        }
        if self.recursion is not None and self.recursion.router is not None:
            routers[self.depth_call.key] = self.recursion.router
        return routers

    @property
    def depth_call(self) -> RouterCall:
        """Identifies the choice of how often each token recurs, by the first layer that does."""
        return RouterCall(self.first_layer + self.core.start, 0, "depth")

    def lengths(self, length: int) -> list[int]:
        """Return how many of a sequence's `length` tokens each application computes, on average."""
        lengths = [length] * len(self.plan)
        if self.recursion is not None:
            for part, num in zip(self.recursions(), self.recursion.lengths(length), strict=True):
                lengths[part.start : part.stop] = [num] * len(part)
        return lengths

    def recursions(self) -> list[range]:
        """Divide the applications of layers that repeat by repeats."""
        assert self.recursion is not None
        size = len(self.core) // self.recursion.num_recursions
        return [self.core[i : i + size] for i in range(0, len(self.core), size)]

    def losses(self, output: StackOutput, token_mask: Tensor | None) -> dict[str, Tensor]:
        """Compute the losses on what layers hand on, of tokens [B, S], by name."""
        if output.recursion is not None:
            return output.recursion.losses
        if output.state.halting is None:
            return {}
        halting = [block.halting for block in map(self.block, self.plan) if block.halting]
        losses = halting[0].losses(output.state.halting, token_mask, len(halting))
        return {f"halting/{name}": loss for name, loss in losses.items()}

    def applications(self) -> Counter[nn.Module]:
        """Count the uses of every module in a forward, those of shared ones added up."""
        return Counter(module for layer in self.plan for module in used_modules(self.block(layer)))

    def num_uses(self) -> dict[Tensor, int]:
        """Count the uses in a forward of each parameter that has several."""
        return {
            parameter: num_uses
            for module, num_uses in self._shared
            for parameter in module.parameters(recurse=False)
        }

    def forward(
        self,
        x: Tensor,
        masks: LayerMasks,
        cache: tuple[KeyValues, ...] | None = None,
        memory: EncoderMemory | None = None,
        trace: bool = False,
        state: LayerState = EMPTY_STATE,
    ) -> StackOutput:
        """x [B, S, D] -> x [B, S, D]; `cache` has an entry per application of a layer.

        The first layer takes `state`.
        """
        run = _Forward(self, masks, cache, memory, trace, state)
        chosen = None
        if self.recursion is None:
            x = run.apply(range(len(self.plan)), x)
        else:
            x = run.apply(range(self.core.start), x)
            chosen = self._recur(self.recursion, x, run)
            x = run.apply(range(self.core.stop, len(self.plan)), chosen.x)
        longer, traces = tuple(run.extended), run.traces
        if run.state.halting is not None:
            run.token_sums |= token_sums(run.state.halting, masks.full.query_mask)
        if chosen is not None:
            run.token_sums |= chosen.token_sums()
        return StackOutput(
            x,
            run.statistics,
            None if cache is None else longer,
            traces if trace else None,
            run.state,
            run.token_sums,
            chosen,
        )

    def _recur(self, recursion: Recursion, x: Tensor, run: _Forward) -> RecursionOutput:
        """Apply the layers that repeat to tokens that choose how often."""
        parts, token_mask = self.recursions(), run.masks.full.query_mask
        output: RecursionOutput = recursion(
            x, token_mask, lambda r, h, places: run.apply(parts[r], h, places)
        )
        if output.depth is not None:
            run.statistics[self.depth_call] = output.depth.statistics
        if run.trace:
            real = torch.ones_like(x[..., 0], dtype=torch.bool)
            real = real if token_mask is None else token_mask
            for call in (self.plan[i].call for i in self.core):
                if run.traces[call].running is None:
                    run.traces[call] = run.traces[call]._replace(running=real)
            if output.depth is not None:
                first = run.traces[self.plan[self.core.start].call]
                first.routing[self.depth_call.router] = output.depth
        return output

    def blocks(self) -> Iterable[Block]:
        """All blocks, in the order in which they are first applied."""
        return cast(Iterable[Block], self.layers)

    def block(self, layer: PlannedLayer) -> Block:
        """Return the block that is applied."""
        return cast(Block, self.layers[layer.block])

    def apply_layer(
        self,
        index: int,
        repeats: Repeats,
        x: Tensor,
        mask: AttentionMask,
        gathered: GatheredExperts,
        cache: KeyValues | None,
        memory: EncoderMemory | None,
        trace: bool,
        state: LayerState,
    ) -> BlockOutput:
        """Call a block, compiled or recomputed if its stack is."""
        layer, rest = self.layers[index], (cache, memory, trace, state)
        again = self.recompute if torch.is_grad_enabled() else frozenset[str]()
        if "block" in again:
            detached = gathered.map(repeats.detached)
            return cast(BlockOutput, recomputed(layer, repeats, layer, x, mask, detached, *rest))
        if self._compiled is None or not (torch.is_grad_enabled() and self.training) or trace:
            parts = Recomputation(again, repeats) if again else None
            with repeats.summing():
                return layer(x, mask, gathered.map(repeats.detached), *rest, parts)
        compiled, alias = self._compiled[index], repeats.aliases()
        weights = {
            f"{name}.{key}".lstrip("."): alias.get(weight, weight)
            for name, module in named_used_modules(self.layers[index])
            for key, weight in module.named_parameters(recurse=False)
        }
        gathered = gathered.map(lambda weight: alias.get(weight, weight))
        return functional_call(compiled, weights, (x, mask, gathered, *rest))


def _state_norms(
    state: LayerState, layer: PlannedLayer, token_mask: Tensor | None
) -> dict[str, Tensor]:
    """Sum up the norms of what the layer's recurrent routers hand on."""
    sums = {}
    for name, past in (state.routers or {}).items():
        if name in layer.routers:
            layer_number, repeat, router = layer.routers[name]
            key = f"state_norm/layer{layer_number}.repeat{repeat}.{router}"
            sums[key] = sum_and_number(past.detach().norm(dim=-1), token_mask)
    return sums


class _Forward:
    """A forward of a stack: what its applications share, and what they return."""

    def __init__(
        self,
        stack: LayerStack,
        masks: LayerMasks,
        cache: tuple[KeyValues, ...] | None,
        memory: EncoderMemory | None,
        trace: bool,
        state: LayerState,
    ) -> None:
        self.stack, self.masks, self.cache = stack, masks, cache
        self.memory, self.trace = memory, trace
        self.statistics: dict[RouterCall, RoutingStatistics] = {}
        self.traces: dict[LayerCall, BlockTrace] = {}
        self.token_sums: dict[str, Tensor] = {}
        self.extended: list[KeyValues] = []
        self.state = state
        # Gathers of expert weights start for all layers at once and are awaited at first use, so
        # that they overlap with the computation of earlier layers.
        self._gathering = ExpertGathering()
        for block in stack.blocks():
            block.start_gathering(self._gathering)
        self._repeats: dict[int, Repeats] = {}
        self._sums = GradientSums(stack.num_uses())

    def apply(self, part: range, x: Tensor, places: Places | None = None) -> Tensor:
        """Apply some layers to x [B, S, D], or to tokens [B, n, D] packed into `places`."""
        packed = None
        if places is not None:  # what is packed has no windows, so layers see the same
            past = None if self.cache is None else self.cache[part.start]
            packed = places.mask(self.masks.full, past, x, self.stack.d_head)
        for i in part:
            layer, past = self.stack.plan[i], None if self.cache is None else self.cache[i]
            block, mask = self.stack.block(layer), packed or self.masks.of(i)
            gathered = block.gathered(self._gathering)
            if layer.block not in self._repeats:
                self._repeats[layer.block] = self._sums.of(block.weights(gathered))
            halts = block.halting is not None
            output = self.stack.apply_layer(
                layer.block,
                self._repeats[layer.block],
                x,
                mask,
                gathered,
                past,
                self.memory,
                self.trace,
                self.state if halts else self.state._replace(halting=None),
            )
            x, state = output.x, output.state
            # Layers that nothing halts in would keep the state of others until the backward pass.
            self.state = state if halts else state._replace(halting=self.state.halting)
            if output.cache is not None:
                held = () if places is None else (mask.key_mask,)
                self.extended.append((*output.cache, *held))
            self.token_sums |= _state_norms(self.state, layer, mask.query_mask)
            for router, value in output.statistics.items():
                self.statistics[layer.routers[router]] = value
            if output.trace is not None:
                trace = output.trace
                self.traces[layer.call] = trace if places is None else places.spread(trace)
        return x
