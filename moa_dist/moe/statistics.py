"""Statistics of routers: sums that can be added over the repeats of a shared layer.

Shapes: N groups of sequences, G router groups (heads in SwitchHead, else 1), E experts per
router group. All sums run over the real tokens of one group of sequences, so they do not
depend on how ranks and micro-batches share the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

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

    def plus(self, other: RoutingStatistics) -> RoutingStatistics:
        """Add the sums of both, which must have the same groups of sequences."""
        return RoutingStatistics(*(a + b for a, b in zip(self, other, strict=True)))

    def as_one_group(self) -> RoutingStatistics:
        """Sum over all groups of sequences as if they were one group: N becomes 1."""
        return RoutingStatistics(*(part.sum(0, keepdim=True) for part in self))


def total(statistics: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Add up applications, such as the repeats of a shared layer."""
    return reduce(RoutingStatistics.plus, statistics)


class RoutingReport(NamedTuple):
    """The part of the statistics that is reported: additive, without gradient."""

    load: Tensor
    """[G, E] int64."""
    dropped: Tensor
    """[G, E] int64."""
    entropy: Tensor
    """[2]: sum of entropies, and the number of (token, router group) pairs it runs over."""


def report(statistics: RoutingStatistics) -> RoutingReport:
    """Sum statistics over groups of sequences, detached."""
    num_router_groups = statistics.load.shape[1]
    pairs = statistics.num_tokens.sum() * num_router_groups
    entropy = statistics.entropy.detach().sum()
    return RoutingReport(
        load=statistics.load.sum(0),
        dropped=statistics.dropped.sum(0),
        entropy=torch.stack([entropy.double(), pairs.double()]),
    )
