"""A group of ranks as one layer uses it, with the books that are kept about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.traffic import Purpose, TrafficCounter, TrafficKey


@dataclass(frozen=True)
class CommGroup:
    """A group of ranks as one layer uses it."""

    group: dist.ProcessGroup
    """Who takes part."""
    layer: str
    """Whose traffic it is."""
    traffic_counter: TrafficCounter
    """Where it is counted."""
    comm_timer: CommTimer
    """Where waiting for it is counted."""
    overlap: bool = False
    """Collectives run beside computation until their result is waited for."""

    def count(self, purpose: Purpose, num_bytes: int, *, backward: bool = False) -> None:
        """Count one collective that sent `num_bytes` to other ranks."""
        self.traffic_counter.add(TrafficKey(self.layer, purpose, backward), num_bytes)
