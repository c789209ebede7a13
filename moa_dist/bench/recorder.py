"""What a layer asks its plans to do, recorded to be measured by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from moa_dist.distributed.arriving import Arriving, here
from moa_dist.kernels.routed import routed_experts
from moa_dist.kernels.trip import Experts, Trip
from moa_dist.moe.dispatch import Level, LocalDispatcher, LocalPlan
from moa_dist.moe.router import Routing


class Recorded(NamedTuple):
    """One application of experts."""

    experts: Experts
    x: Tensor
    trip: Trip

    def sources(self) -> list[Tensor]:
        """All that gets a gradient."""
        weight = [] if self.trip.weight is None else [self.trip.weight]
        return [self.x, *self.experts.matrices(), *weight]


@dataclass(frozen=True)
class _RecordingPlan:
    plan: LocalPlan
    applied: list[Recorded]

    def send(self, x: Tensor, read: Level) -> Arriving:
        """See `DispatchPlan.send`."""
        return self.plan.send(x, read)

    def apply(
        self, experts: Experts, sent: Arriving, read: Level, write: Level, *, weighted: bool
    ) -> Arriving:
        """See `DispatchPlan.apply`."""
        x = sent.wait()
        trip = self.plan.trip(read, write, len(experts.down), weighted)
        leaves = trip._replace(weight=None if trip.weight is None else _leaf(trip.weight))
        self.applied.append(Recorded(experts, _leaf(x), leaves))
        return here(routed_experts(experts, x, trip))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@dataclass(frozen=True)
class RecordingDispatcher:
    """A local dispatcher that remembers."""

    planned: list[tuple[Routing, int]] = field(default_factory=list)
    """What was planned, and over how many experts."""
    applied: list[Recorded] = field(default_factory=list)
    """What experts were applied to."""

    def fullest(self) -> str:
        """How uneven the loads were."""
        counts = [applied.trip.counts.double() for applied in self.applied]
        worst = max(float(each.max() / each.mean()) for each in counts)
        return f"fullest expert: {worst:.2f} x the mean load"

    def plan(self, routing: Routing, num_experts: int) -> _RecordingPlan:
        """See `Dispatcher.plan`."""
        detached = routing._replace(weights=routing.weights.detach())
        self.planned.append((detached, num_experts))
        return _RecordingPlan(LocalDispatcher().plan(routing, num_experts), self.applied)
