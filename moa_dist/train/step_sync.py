"""What ranks exchange between two steps, in one collective each time."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.mesh import Mesh
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.calls import RouterCall
from moa_dist.models.objective import Batch
from moa_dist.moe.statistics import RoutingReport
from moa_dist.train.step_timer import StepInterval

_DIGEST_BITS = 40
"""Bits of a digest, few enough for a sum over 2^22 ranks in 64 bits."""


@dataclass(frozen=True)
class StepSync:
    """What ranks agreed on before a step; equal on every rank."""

    stop: bool
    """Whether any rank was asked to stop."""
    digest: str
    """Digest of the token ids of the step's global batch, equal in all layouts; 10 hex digits."""


def sync_step(
    stop: bool, batches: Sequence[Batch], device: torch.device, comm_timer: CommTimer
) -> StepSync:
    """Agree on whether to stop, and on a digest of what all ranks have read. Collective.

    The digest is a sum over sequences, because layouts divide these differently.
    """
    digest = sum(_digest(texts) for batch in batches for texts in _texts(batch))
    both = torch.tensor([int(stop), digest % 2**_DIGEST_BITS], dtype=torch.int64, device=device)
    with comm_timer.begin("agreement between steps"):
        dist.all_reduce(both)
    num_stop_requests, total = both.tolist()
    return StepSync(stop=num_stop_requests > 0, digest=f"{total % 2**_DIGEST_BITS:010x}")


def _texts(batch: Batch) -> Iterator[list[torch.Tensor]]:
    """Yield what belongs to each sequence, without padding."""
    for row in range(batch.num_sequences):
        one = batch.rows(slice(row, row + 1))
        tokens = one.tokens if one.token_mask is None else one.tokens[one.token_mask]
        texts = [tokens, one.targets]
        if one.source is not None:
            texts.append(one.source if one.source_mask is None else one.source[one.source_mask])
        yield [text for text in texts if text is not None]


def _digest(texts: list[torch.Tensor]) -> int:
    data = b"".join(text.numpy().tobytes() for text in texts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=_DIGEST_BITS // 8).digest(), "little")


def names_of_hosts() -> list[str]:
    """Gather the host names of all ranks, in rank order. Collective."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


class Interval(NamedTuple):
    """Routing and traffic of the last step, times since the last report; equal on every rank."""

    routing: dict[RouterCall, RoutingReport]
    """Routing reports summed over ranks, on the CPU."""
    traffic: dict[TrafficKey, TrafficVolume]
    """Traffic summed over ranks."""
    work: list[float]
    """Seconds per step that each rank worked, without waiting for others."""
    wait: list[float]
    """Seconds per step that each rank waited."""
    part_squares: Tensor | None
    """What `measured_parts` yielded, summed over ranks, on the CPU."""


def gather_interval(
    routing: dict[RouterCall, RoutingReport],
    traffic: dict[TrafficKey, TrafficVolume],
    lap: StepInterval,
    mesh: Mesh,
    device: torch.device,
    part_squares: Tensor | None = None,
) -> Interval:
    """Sum the counts of all ranks and gather their times; one collective."""
    times = torch.zeros(mesh.world_size, 2, dtype=torch.float64, device=device)
    own = torch.tensor([lap.seconds - lap.waited, lap.waited], dtype=torch.float64)
    times[mesh.rank] = own / lap.steps
    volumes = torch.tensor([*traffic.values()], dtype=torch.int64, device=device)
    counts = [part for value in routing.values() for part in value]
    squares = [] if part_squares is None else [part_squares]
    reports = [times, volumes, *squares, *counts]
    summed = (part.cpu() for part in sum_over_ranks(reports, mesh.comm_timer, "a report"))
    work, wait = next(summed).T.tolist()
    totals = next(summed).tolist()
    total_squares = next(summed) if squares else None
    return Interval(
        routing={s: RoutingReport(*islice(summed, len(value))) for s, value in routing.items()},
        traffic={key: TrafficVolume(*v) for key, v in zip(traffic, totals, strict=True)},
        work=work,
        wait=wait,
        part_squares=total_squares,
    )
