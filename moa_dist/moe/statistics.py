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

    @property
    def divisor(self) -> Tensor:
        """[N], what turns the sums that carry gradients into means over tokens; 1 without any."""
        return self.num_tokens.clamp(min=1) if self.weight is None else _or_one(self.weight)

    def each(self, function: Callable[[Tensor], Tensor]) -> RoutingStatistics:
        """Apply a function to all parts."""
        return RoutingStatistics(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]  # None stays None

    def as_one_group(self) -> RoutingStatistics:
        """Sum over all groups of sequences as if they were one group: N becomes 1."""
        dims = iter((-1, -3, -3, -3, -2, -2, -1))  # those of N; routers may be stacked before them
        return self.each(lambda part: part.sum(next(dims), keepdim=True))

    def weighed(self, logits: Tensor, weight: Tensor) -> RoutingStatistics:
        """Count tokens, whose logits are [T, G, E], by `weight` [T] in sums that carry gradients.

        Tokens that are not routed must have the weight 0.
        """
        log_sum = logits.logsumexp(-1)
        probability = (logits - log_sum[:, :, None]).exp()
        entropy = log_sum - (probability * logits).sum(-1)

        def per_group(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(self.num_tokens), -1)).sum(1)

        return self._replace(
            probability=per_group(probability * weight[:, None, None]),
            z=per_group(log_sum.square() * weight[:, None]),
            entropy=per_group(entropy * weight[:, None]),
            weight=per_group(weight),
        )


def _or_one(weight: Tensor) -> Tensor:
    """Return `weight`, or 1 where it is 0."""
    return weight.where(weight > 0, 1.0)


def total(statistics: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Add up applications, such as the repeats of a shared layer."""
    return stacked(statistics).each(lambda part: part.sum(0))


def stacked(statistics: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Stack statistics of equal shapes, all or none weighed, along a new first dimension."""
    parts = zip(*statistics, strict=True)
    return RoutingStatistics(*(None if p[0] is None else torch.stack(p) for p in parts))  # type: ignore[arg-type]  # only the last may be None


class RoutingReport(NamedTuple):
    """The part of the statistics that is reported: additive, without gradient."""

    load: Tensor
    """[G, E] int64."""
    dropped: Tensor
    """[G, E] int64."""
    entropy: Tensor
    """[2]: sum of entropies, and the number of (token, router group) pairs it runs over."""

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
    )


Key = TypeVar("Key", bound=Hashable)


def reports(statistics: Mapping[Key, RoutingStatistics]) -> dict[tuple[Key, ...], RoutingReport]:
    """Report on many applications of routers at once: those of equal shapes together, stacked."""
    by_shape: dict[tuple[torch.Size, bool], list[Key]] = {}
    for key, value in statistics.items():
        by_shape.setdefault((value.load.shape, value.weight is None), []).append(key)
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
