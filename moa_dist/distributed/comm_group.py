"""A process group as one layer uses it, with the counters that record its traffic and waiting."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.traffic import Purpose, TrafficCounter, TrafficKey


@dataclass(frozen=True)
class CommGroup:
    """A process group as one layer uses it."""

    group: dist.ProcessGroup
    """The participating ranks."""
    layer: str
    """Name of the module that communicates, such as `stack.layers.0.ffn`."""
    traffic_counter: TrafficCounter
    """Counts the bytes sent."""
    comm_timer: CommTimer
    """Measures the time spent waiting."""
    overlap: bool = False
    """Whether collectives are asynchronous and overlap with computation."""

    def count(self, purpose: Purpose, num_bytes: int, *, backward: bool = False) -> None:
        """Record one collective that sent `num_bytes` to other ranks."""
        self.traffic_counter.add(TrafficKey(self.layer, purpose, backward), num_bytes)
