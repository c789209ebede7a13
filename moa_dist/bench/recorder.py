"""Records what a layer asks its dispatcher to do, so that each part can be measured alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from moa_dist.distributed.pending import Pending, ready
from moa_dist.kernels.routed_experts import RoutedExperts, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.moe.dispatch import Level, LocalPlan, LocalTokenDispatcher
from moa_dist.moe.router import Routing


class Recorded(NamedTuple):
    """One application of experts."""

    experts: ExpertWeights
    x: Tensor
    row_map: RowMap

    def sources(self) -> list[Tensor]:
        """Return all tensors that get a gradient."""
        weight = [] if self.row_map.weight is None else [self.row_map.weight]
        return [self.x, *self.experts.tensors(), *weight]


@dataclass(frozen=True)
class _RecordingPlan:
    plan: LocalPlan
    applied: list[Recorded]

    def dispatch(self, x: Tensor, read: Level) -> Pending:
        """Dispatch as the local plan does."""
        return self.plan.dispatch(x, read)

    def run_and_combine(
        self, experts: ExpertWeights, sent: Pending, read: Level, write: Level, *, weighted: bool
    ) -> Pending:
        """Record inputs and weights as new leaves, then apply the experts."""
        x = sent.wait()
        row_map = self.plan.row_map(read, write, len(experts.down), weighted)
        leaves = row_map._replace(weight=None if row_map.weight is None else _leaf(row_map.weight))
        self.applied.append(Recorded(experts, _leaf(x), leaves))
        return ready(routed_experts(experts, x, row_map))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@dataclass(frozen=True)
class RecordingDispatcher:
    """A local dispatcher that records its calls."""

    kernel: RoutedExperts = routed_experts
    """Runs the experts."""
    planned: list[tuple[Routing, int]] = field(default_factory=list)
    """Routings that were planned, with the number of experts."""
    applied: list[Recorded] = field(default_factory=list)
    """Applications of experts, in order."""

    def fullest(self) -> str:
        """Describe how uneven the loads were."""
        counts = [applied.row_map.counts.double() for applied in self.applied]
        worst = max(float(each.max() / each.mean()) for each in counts)
        return f"fullest expert: {worst:.2f} x the mean load"

    def plan(self, routing: Routing, num_experts: int) -> _RecordingPlan:
        """Record the routing, then plan as the local dispatcher does."""
        detached = routing._replace(topk_weights=routing.topk_weights.detach())
        self.planned.append((detached, num_experts))
        return _RecordingPlan(LocalTokenDispatcher().plan(routing, num_experts), self.applied)
