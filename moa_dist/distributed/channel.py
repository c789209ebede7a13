"""A group of ranks as one layer uses it, with the books that are kept about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from moa_dist.distributed.traffic import Flow, Ledger, Purpose
from moa_dist.distributed.waiting import Waits


@dataclass(frozen=True)
class Channel:
    """A group of ranks as one layer uses it."""

    group: dist.ProcessGroup
    """Who takes part."""
    layer: str
    """Whose traffic it is."""
    ledger: Ledger
    """Where it is counted."""
    waits: Waits
    """Where waiting for it is counted."""
    overlap: bool = False
    """Collectives run beside computation until their result is waited for."""

    def count(self, purpose: Purpose, num_bytes: int, *, backward: bool = False) -> None:
        """Count one collective that sent `num_bytes` to other ranks."""
        self.ledger.add(Flow(self.layer, purpose, backward), num_bytes)
