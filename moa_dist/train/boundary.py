"""What all ranks tell each other between two steps, a collective each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moa_dist.models.objective import Batch
from moa_dist.models.stack import Site
from moa_dist.moe.statistics import RoutingReport

_DIGEST_BITS = 40
"""Leaves room in 64 bits for a sum over 2^22 ranks."""


@dataclass(frozen=True)
class Boundary:
    """Equal on every rank."""

    stop: bool
    """A rank was asked to stop."""
    digest: str
    """Of the token ids of the step's global batch, whatever the layout; 10 hexadecimal digits."""


def agree(stop: bool, batches: Sequence[Batch], device: torch.device) -> Boundary:
    """Collective: whether any rank wants to stop, and what all of them have read.

    The digest is a sum over sequences, for ranks and micro-batches divide them differently.
    """
    digest = sum(_digest(row) for batch in batches for row in batch.tokens)
    both = torch.tensor([int(stop), digest % 2**_DIGEST_BITS], dtype=torch.int64, device=device)
    dist.all_reduce(both)
    wishes, total = both.tolist()
    return Boundary(stop=wishes > 0, digest=f"{total % 2**_DIGEST_BITS:010x}")


def _digest(tokens: torch.Tensor) -> int:
    data = tokens.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=_DIGEST_BITS // 8).digest(), "little")


def sum_over_ranks(
    routing: dict[Site, RoutingReport], device: torch.device
) -> dict[Site, RoutingReport]:
    """Sums over ranks, on the CPU; one collective."""
    if not routing:
        return {}
    parts = [part for value in routing.values() for part in value]
    flat = torch.cat([part.to(device).double().flatten() for part in parts])  # exact to 2^53
    dist.all_reduce(flat)
    summed = iter(flat.cpu().split([part.numel() for part in parts]))
    return {
        site: RoutingReport(*(next(summed).view(part.shape).to(part.dtype) for part in value))
        for site, value in routing.items()
    }
