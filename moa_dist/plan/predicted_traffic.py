"""Predicts the bytes that ranks send each other in one optimizer step.

There are two parts: expert traffic, by the keys under which `moa_dist.distributed.traffic` counts
it, and what ZeRO moves. Both are sums over all ranks of what leaves a rank. Token traffic follows
from the routing: `expected_rows` assumes a router that chooses evenly and at random, without
padding or drops; given the rows that were really sent, predictions are exact.

Shapes: W ranks, P of them in an expert-parallel group, G router groups, E experts in each, K
chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import comb, prod
from typing import NamedTuple

from torch import nn

from moa_dist.config.routers import GroupLimitConfig
from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.stack_counts import applications
from moa_dist.moe.dispatch import Level
from moa_dist.moe.experts import shard_starts
from moa_dist.moe.routed_module import RoutedModule, routed_modules

_COUNT_BYTES, _INDEX_BYTES = 8, 4
"""Bytes of one number in a plan's counts (int64) and in its indices (int32)."""
MASTER_BYTES = 4
"""Bytes of an element of ZeRO's masters and of optimizer moments."""
ALIGNMENT = 2
"""Elements to which DeepSpeed's stages 1 and 2 pad a partition."""
STAGE3_KEPT = 10**9
"""Elements that stage 3 keeps gathered from forward to backward by default."""


class Rows(NamedTuple):
    """Rows sent to other ranks for one router, in one direction, by level."""

    token: float
    """Number of tokens."""
    group: float
    """Number of (token, router group) pairs."""
    slot: float
    """Number of assignments."""

    def of(self, level: Level) -> float:
        """Return the rows of a level."""
        return float(getattr(self, level))


def expected_rows(
    num_tokens: float,
    *,
    num_groups: int,
    num_experts: int,
    top_k: int,
    num_ranks: int,
    group_limit: GroupLimitConfig | None = None,
) -> Rows:
    """Predict rows of `num_tokens` tokens over `num_ranks` (P) ranks that share the experts.

    A token's K of E experts are random without repetition, so it misses m experts of a rank with
    probability C(E - m, K) / C(E, K). With a limit, so are first its groups of experts, then its
    experts among theirs. A row goes once to each rank that it does not miss.
    """
    limits = (1, 1) if group_limit is None else (group_limit.num_groups, group_limit.top_groups)
    of_a_token = _rows_of_a_token(num_groups, num_experts, top_k, num_ranks, *limits)
    to_others = num_tokens * (num_ranks - 1) / num_ranks
    return Rows(*(rows * to_others for rows in of_a_token))


@cache
def _rows_of_a_token(
    num_groups: int, num_experts: int, top_k: int, num_ranks: int, num_limits: int, top_limits: int
) -> Rows:
    """Return rows of a token to all ranks, its own included."""
    token = group = slot = 0.0
    shards = pairwise(shard_starts(num_groups * num_experts, num_ranks))
    size = num_experts // num_limits
    # Ranks differ only by how many experts of each router group they hold.
    alike = Counter(_held_by_group(first, stop, num_experts, size) for first, stop in shards)
    for held, num_alike in alike.items():
        missed = [_missed(parts, size, top_k, top_limits) for parts in held]
        token += num_alike * (1 - prod(missed))
        group += num_alike * sum(1 - p for p in missed)
        slot += num_alike * sum(top_k * sum(parts) / num_experts for parts in held)
    return Rows(token, group, slot)


def _missed(held: tuple[int, ...], size: int, top_k: int, top_limits: int) -> float:
    """Return how likely none of a token's experts is on a rank.

    It chooses `top_limits` parts of `size` experts each, of which the rank holds `held`, and K
    experts among them.
    """
    ways = Counter({(0, 0): 1})  # sets of parts, by how many they are and the experts held of them
    for here in held:
        for (num_parts, num_held), count in list(ways.items()):
            ways[num_parts + 1, num_held + here] += count
    chosen = {m: count for (num_parts, m), count in ways.items() if num_parts == top_limits}
    missing = sum(count * comb(size * top_limits - m, top_k) for m, count in chosen.items())
    return missing / (comb(len(held), top_limits) * comb(size * top_limits, top_k))


def _held_by_group(
    first: int, stop: int, num_experts: int, size: int
) -> tuple[tuple[int, ...], ...]:
    """Count the flat experts [first, stop) of each router group that has any.

    They are counted by parts of a router group, of `size` experts each.
    """
    groups = range(first // num_experts, -(-stop // num_experts))
    return tuple(
        tuple(
            max(min(stop, start + size) - max(first, start), 0)
            for start in range(g * num_experts, (g + 1) * num_experts, size)
        )
        for g in groups
    )


@dataclass(frozen=True)
class Layout:
    """What traffic depends on besides the model."""

    world_size: int
    """Number of ranks (W)."""
    expert_parallel: int
    """Ranks that share the experts (P), which divides W."""
    num_micro_batches: int
    """Micro-batches per rank and step."""
    num_repeats: int
    """Applications of each layer between prelude and coda in a forward."""
    recompute: frozenset[str]
    """What the backward pass computes again; `block` is a whole layer."""
    element_bytes: int
    """Bytes of an element of activations and weights: 4, 2 in bf16, 8 in fp64."""
    exchange: ExpertExchangeConfig
    """What ranks exchange; `auto` must have been decided."""

    @property
    def router_weight_bytes(self) -> int:
        """Bytes of one router weight, which is fp32 or wider."""
        return max(self.element_bytes, 4)


RowsOfRouter = Callable[[str, str], Rows]
"""(layer, router within it) -> rows of one step, forward: all ranks, micro-batches, repeats."""


def expert_traffic(
    model: nn.Module, layout: Layout, rows_of: RowsOfRouter
) -> dict[TrafficKey, TrafficVolume]:
    """Predict expert traffic of `model` (on any device, unsharded), forward and backward."""
    if layout.expert_parallel == 1:
        return {}
    traffic: dict[TrafficKey, TrafficVolume] = {}
    times = applications(model)
    for name, module in routed_modules(model):
        exchanged = getattr(layout.exchange, module.part)
        traffic |= TRAFFIC[exchanged](name, module, times[module], layout, rows_of)
    return traffic


def _weights(
    layer: str, module: RoutedModule, _times: int, layout: Layout, _: RowsOfRouter
) -> dict[TrafficKey, TrafficVolume]:
    """Count gathers: one per forward and backward, whatever the repeats and recomputation."""
    messages, num_bytes = 0, 0
    for layer_weights in module.held_expert_layers().values():
        num_experts = -(-layer_weights.num_experts // layout.expert_parallel)
        shard = num_experts * layer_weights.macs_per_row()
        messages += 1
        num_bytes += (layout.expert_parallel - 1) * shard * layout.element_bytes
    if not messages:  # borrowed from a module that gathers them
        return {}
    factor = layout.world_size * layout.num_micro_batches
    volume = TrafficVolume(factor * messages, factor * num_bytes)
    return {TrafficKey(layer, "gather", backward): volume for backward in (False, True)}


def _tokens(
    layer: str, module: RoutedModule, times: int, layout: Layout, rows_of: RowsOfRouter
) -> dict[TrafficKey, TrafficVolume]:
    forwards = 2 if layout.recompute & {"block", module.part} else 1
    calls = layout.world_size * layout.num_micro_batches * times
    traffic: dict[TrafficKey, TrafficVolume] = {}

    def add(key: TrafficKey, passes: int, num_bytes: float) -> None:
        more = TrafficVolume(calls * passes, round(num_bytes * passes))
        traffic[key] = traffic[key].plus(more) if key in traffic else more

    projections = module.routed_projections()
    for name, router in {p.router: module.router_of(p) for p in projections}.items():
        rows = rows_of(layer, name)
        # Per assignment the expert and its row at each level that is sent; see moe/all_to_all.py.
        num_numbers = 3 if router.num_groups > 1 else 2
        forward, backward = (TrafficKey(layer, "plan", direction) for direction in (False, True))
        add(forward, forwards, calls * (layout.expert_parallel - 1) * num_numbers * _COUNT_BYTES)
        add(forward, forwards, rows.slot * num_numbers * _INDEX_BYTES)
        add(forward, forwards, rows.slot * layout.router_weight_bytes)
        if any(p.weighted for p in projections if p.router == name):
            add(backward, 1, rows.slot * layout.router_weight_bytes)
    for projection in projections:
        rows = rows_of(layer, projection.router)
        there = rows.of(projection.read) * projection.d_in * layout.element_bytes
        back = rows.of(projection.write) * projection.d_out * layout.element_bytes
        add(TrafficKey(layer, "dispatch", False), forwards, there)
        add(TrafficKey(layer, "dispatch", True), 1, there)
        add(TrafficKey(layer, "combine", False), forwards, back)
        add(TrafficKey(layer, "combine", True), 1, back)
    return traffic


TRAFFIC: dict[
    str,
    Callable[[str, RoutedModule, int, Layout, RowsOfRouter], dict[TrafficKey, TrafficVolume]],
] = {"tokens": _tokens, "weights": _weights}
"""Traffic of a module, applied so many times in a forward, by what ranks exchange for it; see
`moe.sharding.EXCHANGES`."""


class StateTraffic(NamedTuple):
    """Bytes of gradients and parameters that ZeRO moves in a step, over all ranks."""

    gradients: int
    """Gradients, reduced over the ranks that hold the same parameter."""
    parameters: int
    """Updated parameters, gathered by the ranks that compute with them."""


def state_traffic(
    dense: Sequence[int],
    experts: Sequence[int],
    layout: Layout,
    zero_stage: int,
    sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> StateTraffic:
    """Predict what ZeRO moves, as deepspeed 0.19 does it.

    `dense` and `experts` are elements of each parameter on one rank, experts sharded. Stages 1 and
    2 all-reduce gradients and gather parameters, stage 1 once a step, stage 2 once per micro-batch.
    Stage 3 scatters gradients per micro-batch. It gathers small parameters once a step, others
    once per micro-batch as long as all of them fit in what it keeps, else at each use, forward
    and backward, all repeats; its first step, in which it learns the order of modules, costs more.
    """
    world_size, copies = layout.world_size, layout.world_size // layout.expert_parallel
    reductions = 1 if zero_stage < 2 else layout.num_micro_batches
    # Gradients are reduced in the type of the masters: fp32 but at stage 0.
    gradient_bytes = MASTER_BYTES if zero_stage else layout.element_bytes
    gradients = parameters = 0
    for numels, num_ranks in ((dense, world_size), (experts, copies)):
        if num_ranks == 1 or not numels:
            continue
        # What leaves the ranks of all groups when each gets the parts that it lacks.
        factor = (num_ranks - 1) * (world_size // num_ranks)
        if zero_stage < 3:
            gradients += 2 * factor * sum(numels) * gradient_bytes * reductions
            if zero_stage:
                whole = round_up(sum(numels), ALIGNMENT * num_ranks)
                parameters += factor * whole * layout.element_bytes
        else:
            whole = sum(round_up(size, num_ranks) for size in numels)
            gradients += factor * whole * gradient_bytes * reductions
            small = sum(round_up(n, num_ranks) for n in numels if n <= sizes.persistent)
            passes = 1 if sum(dense) + sum(experts) <= STAGE3_KEPT else 2 * layout.num_repeats
            gathered = small + (whole - small) * passes * layout.num_micro_batches
            parameters += factor * gathered * layout.element_bytes
    return StateTraffic(gradients, parameters)


def round_up(number: int, step: int) -> int:
    """Round `number` up to a multiple of `step`."""
    return -(-number // step) * step
