"""What all ranks tell each other between two steps, a collective each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.traffic import Flow, Volume
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
    digest = sum(_digest(texts) for batch in batches for texts in _texts(batch))
    both = torch.tensor([int(stop), digest % 2**_DIGEST_BITS], dtype=torch.int64, device=device)
    dist.all_reduce(both)
    wishes, total = both.tolist()
    return Boundary(stop=wishes > 0, digest=f"{total % 2**_DIGEST_BITS:010x}")


def _texts(batch: Batch) -> Iterator[list[torch.Tensor]]:
    """All that belongs to each sequence, without padding."""
    for row in range(batch.num_sequences):
        one = batch.rows(slice(row, row + 1))
        tokens = one.tokens if one.real is None else one.tokens[one.real]
        texts = [tokens, one.targets]
        if one.source is not None:
            texts.append(one.source if one.source_real is None else one.source[one.source_real])
        yield [text for text in texts if text is not None]


def _digest(texts: list[torch.Tensor]) -> int:
    data = b"".join(text.numpy().tobytes() for text in texts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=_DIGEST_BITS // 8).digest(), "little")


def sum_routing(routing: dict[Site, RoutingReport]) -> dict[Site, RoutingReport]:
    """Sums over ranks, on the CPU; one collective."""
    if not routing:
        return {}
    parts = [part for value in routing.values() for part in value]
    summed = (part.cpu() for part in sum_over_ranks(parts))
    return {site: RoutingReport(*islice(summed, len(value))) for site, value in routing.items()}


def sum_traffic(traffic: dict[Flow, Volume], device: torch.device) -> dict[Flow, Volume]:
    """Sums over ranks; one collective, unless nothing is sent, which all ranks know alike."""
    if not traffic:
        return {}
    own = torch.tensor(list(traffic.values()), device=device)
    (total,) = sum_over_ranks([own])
    return {flow: Volume(*v) for flow, v in zip(traffic, total.tolist(), strict=True)}
