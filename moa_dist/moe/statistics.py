"""Statistics of routers: sums that can be added over the repeats of a shared layer.

Shapes: N groups of sequences, G router groups (heads in SwitchHead, else 1), E experts per
router group. All sums run over the real tokens of one group of sequences, so they do not
depend on how ranks and micro-batches share the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


def occurrences(ids: Tensor, num_ids: int) -> Tensor:
    """Count how often each of 0 ... `num_ids` - 1 occurs in `ids` [A] int64; returns [num_ids].

    Unlike `bincount` it never reads a value on the host, so it never waits for an accelerator.
    """
    return ids.new_zeros(num_ids).scatter_add_(0, ids, torch.ones_like(ids))


class RoutingStatistics(NamedTuple):
    """Sums over one application of a router, or over several."""

    num_tokens: Tensor
    """[N] int64, real tokens."""
    load: Tensor
    """[N, G, E] int64, assignments per expert before dropping."""
    dropped: Tensor
    """[N, G, E] int64, assignments dropped for lack of capacity."""
    probability: Tensor
    """[N, G, E], sum of softmax(logits); carries a gradient."""
    z: Tensor
    """[N, G], sum of squared logsumexp(logits); carries a gradient."""
    entropy: Tensor
    """[N, G], sum of the entropy of softmax(logits) in nats; carries a gradient."""
    weight: Tensor | None = None
    """[N], sum of the weights of tokens by which the three sums above count them; carries a
    gradient. None where every token counts once."""
    own: Tensor | None = None
    """[N, M], sums that this kind of router alone needs, for its losses or its state; None for
    most."""
    reported: Tensor | None = None
    """[N, P], sums over tokens of what is particular to a kind, in the order of
    `Router.mean_names`: used for reports alone, which divide by the number of tokens. None for
    most."""

    @property
    def divisor(self) -> Tensor:
        """[N], what turns the sums that carry gradients into means over tokens; 1 without any."""
        return self.num_tokens.clamp(min=1) if self.weight is None else _or_one(self.weight)

    @property
    def mean_probability(self) -> Tensor:
        """[N, G, E], `probability` as a mean over tokens; 0 where a group of sequences has none."""
        return self.probability / self.divisor[..., None, None]

    def each(self, function: Callable[[Tensor], Tensor]) -> RoutingStatistics:
        """Apply a function to all parts."""
        return RoutingStatistics(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]  # None stays None

    def present(self) -> tuple[Tensor, ...]:
        """Return the parts that are not None."""
        return tuple(part for part in self if part is not None)

    def summed_repeats(self, num_routers: int) -> RoutingStatistics:
        """Add up the applications of each router, which are stacked: [applications, ...]."""
        return self.each(lambda part: part.unflatten(0, (num_routers, -1)).sum(1))

    def as_one_group(self) -> RoutingStatistics:
        """Sum over all groups of sequences as if they were one group: N becomes 1."""
        dims = (-1, -3, -3, -3, -2, -2, -1, -2, -2)  # those of N; routers may be stacked before
        present = iter([dim for dim, part in zip(dims, self, strict=True) if part is not None])
        return self.each(lambda part: part.sum(next(present), keepdim=True))

    def reporting(self, values: Tensor, token_mask: Tensor | None) -> RoutingStatistics:
        """Report `values` [T, P] of tokens, after what is reported already.

        `token_mask`, of T elements, is true for real tokens; None if all are.
        """
        values = values.detach()
        if token_mask is not None:
            values = values * token_mask.reshape(-1, 1)
        sums = sum_by_group(values, len(self.num_tokens))
        if self.reported is not None:
            sums = torch.cat([self.reported, sums], 1)
        return self._replace(reported=sums)

    def weighed(self, logits: Tensor, weight: Tensor) -> RoutingStatistics:
        """Count tokens, whose logits are [T, G, E], by `weight` [T] in sums that carry gradients.

        Tokens that are not routed must have the weight 0.
        """
        num_groups = len(self.num_tokens)
        sums = _differentiable_sums(logits, weight, num_groups)
        return self._replace(**sums, weight=sum_by_group(weight, num_groups))


def sum_by_group(x: Tensor, num_sequence_groups: int) -> Tensor:
    """Sum x [T, ...] over the tokens of each group of sequences: [N, ...]."""
    return x.unflatten(0, (num_sequence_groups, -1)).sum(1)


def _differentiable_sums(
    logits: Tensor, weight: Tensor | None, num_sequence_groups: int
) -> dict[str, Tensor]:
    """Compute the sums that carry gradients from `logits` [T, G, E], by their names.

    Tokens count by `weight` [T], or once if it is None; a mask [T] bool leaves out the others.
    """
    # All come from one logsumexp. Written as `-p log p`, the entropy would have an infinite slope
    # where a probability underflows, which makes gradients NaN; in logits it has none.
    log_sum = logits.logsumexp(-1)
    probability = (logits - log_sum[:, :, None]).exp()
    z, entropy = log_sum.square(), log_sum - (probability * logits).sum(-1)
    if weight is not None:
        probability = probability * weight[:, None, None]
        z, entropy = z * weight[:, None], entropy * weight[:, None]
    parts = {"probability": probability, "z": z, "entropy": entropy}
    return {name: sum_by_group(part, num_sequence_groups) for name, part in parts.items()}


def _or_one(weight: Tensor) -> Tensor:
    """Return `weight`, or 1 where it is 0."""
    return weight.where(weight > 0, 1.0)


def routing_statistics(
    logits: Tensor,
    chosen_ids: Tensor,
    keep_mask: Tensor | None,
    token_mask: Tensor | None,
    num_sequence_groups: int,
    assigned: Tensor | None = None,
) -> RoutingStatistics:
    """Sum up, per group of sequences, `logits` [T, G, E] and `chosen_ids`, `keep_mask` [T, G, K].

    `token_mask` [T] bool excludes padding; None for none. `assigned` [T, G, K] bool is false for
    places that hold no assignment; None if all do.
    """
    T, G, E = logits.shape
    N = num_sequence_groups
    counted = torch.ones(T, dtype=torch.int64, device=logits.device)
    if token_mask is not None:
        counted = token_mask.long()
    chosen = counted[:, None, None].expand_as(chosen_ids)
    chosen = chosen if assigned is None else chosen * assigned
    dropped = torch.zeros_like(chosen) if keep_mask is None else chosen * ~keep_mask

    def per_expert(x_TGK: Tensor) -> Tensor:
        """[T, G, K] -> [N, G, E]: sum by chosen expert."""

        def by_group(x: Tensor) -> Tensor:  # [T, G, K] -> [N, G, T / N * K]
            return x.unflatten(0, (N, -1)).transpose(1, 2).flatten(2)

        sums = torch.zeros(N, G, E, dtype=torch.int64, device=logits.device)
        return sums.scatter_add_(-1, by_group(chosen_ids), by_group(x_TGK))

    return RoutingStatistics(
        num_tokens=sum_by_group(counted, N),
        load=per_expert(chosen),
        dropped=per_expert(dropped),
        **_differentiable_sums(logits, token_mask, N),
    )


def total(statistics: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Add up applications, such as the repeats of a shared layer."""
    return stacked(statistics).each(lambda part: part.sum(0))


def stacked(statistics: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Stack statistics of equal shapes, all or none weighed, along a new first dimension."""
    parts = zip(*statistics, strict=True)
    return RoutingStatistics(*(None if p[0] is None else torch.stack(p) for p in parts))  # type: ignore[arg-type]  # only the last three may be None


class RoutingReport(NamedTuple):
    """The part of the statistics that is reported: additive, without gradient."""

    load: Tensor
    """[G, E] int64."""
    dropped: Tensor
    """[G, E] int64."""
    entropy: Tensor
    """[2]: sum of entropies, and the number of (token, router group) pairs it runs over."""
    own: Tensor = torch.zeros(0)
    """[M], see `RoutingStatistics`."""
    reported: Tensor = torch.zeros(0)
    """[P] fp64, likewise."""

    def plus(self, other: RoutingReport) -> RoutingReport:
        """Add the sums of both."""
        return RoutingReport(*(a + b for a, b in zip(self, other, strict=True)))


def report(statistics: RoutingStatistics) -> RoutingReport:
    """Sum statistics over groups of sequences, detached; of each, where they are stacked."""
    num_router_groups = statistics.load.shape[-2]
    pairs = statistics.num_tokens.sum(-1) * num_router_groups
    entropy = statistics.entropy.detach().sum((-1, -2))
    if statistics.weight is not None:  # as a mean over tokens that have a weight
        total = statistics.weight.detach().sum(-1)
        entropy = entropy / _or_one(total) * statistics.num_tokens.sum(-1)
    return RoutingReport(
        load=statistics.load.sum(-3),
        dropped=statistics.dropped.sum(-3),
        entropy=torch.stack([entropy.double(), pairs.double()], dim=-1),
        own=own_sums(statistics),
        reported=_summed(statistics.reported, statistics),
    )


def own_sums(statistics: RoutingStatistics) -> Tensor:
    """Sum `RoutingStatistics.own` over groups of sequences, detached: [M] fp64, or stacks of it."""
    return _summed(statistics.own, statistics)


def _summed(sums: Tensor | None, statistics: RoutingStatistics) -> Tensor:
    if sums is None:
        return statistics.z.new_empty(*statistics.load.shape[:-3], 0, dtype=torch.float64)
    return sums.detach().double().sum(-2)


Key = TypeVar("Key", bound=Hashable)


def reports(statistics: Mapping[Key, RoutingStatistics]) -> dict[tuple[Key, ...], RoutingReport]:
    """Report on many applications of routers at once: those of equal shapes together, stacked."""
    by_shape: dict[tuple[object, ...], list[Key]] = {}
    for key, value in statistics.items():
        shapes = tuple(None if part is None else part.shape for part in value)
        by_shape.setdefault(shapes, []).append(key)
    return {
        tuple(keys): report(stacked(statistics[key] for key in keys)) for keys in by_shape.values()
    }


def report_each(together: Mapping[tuple[Key, ...], RoutingReport]) -> dict[Key, RoutingReport]:
    """Take apart what `reports` returned."""
    return {
        key: RoutingReport(*parts)
        for keys, value in together.items()
        for key, *parts in zip(keys, *value, strict=True)
    }
