"""Workloads with a known result, timed on every rank.

Values are small integers, so every result is exact in any precision and any order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

_MIB = 2**20
_MAX_PARTNERS = 4


@dataclass(frozen=True)
class Probe:
    """A workload and the check of its result."""

    name: str
    """Name in the report."""
    run: Callable[[], Tensor]
    """Performs the work; this is what is timed."""
    problem: Callable[[Tensor], str | None]
    """Describes what is wrong with the result; None if it is correct."""
    is_local: bool = False
    """Whether it involves no other rank, so that it may fail on one rank only."""
    coupled: bool = False
    """Whether every rank waits for the slowest one, and so shows the same time."""


def all_probes(device: torch.device, hosts: Sequence[str]) -> list[Probe]:
    """List the probes to run; `hosts` is by rank."""
    exchanges = [exchange(device, step) for step in partner_steps(hosts)]
    return [matmul(device), *exchanges, all_to_all(device), all_reduce(device)]


def matmul(device: torch.device) -> Probe:
    """Multiply [M, K] by [K, M]; a GPU uses its tensor cores."""
    is_gpu = device.type == "cuda"
    # On a CPU it takes longer than a scheduler time slice (some ms). Otherwise the best of ten
    # would be one that ran without competition for the core, and contention would not show.
    M, K, dtype = (8192, 2048, torch.bfloat16) if is_gpu else (1024, 2048, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randint, device=device, generator=generator)
    # Sums of K products of -1, 0 and 1 stay below 256 (8 standard deviations): exact in bf16.
    a_MK, b_KM = (draw(-1, 2, shape).to(dtype) for shape in ((M, K), (K, M)))
    weight_M = draw(1, 100, (M,)).double()
    # A wrong element changes the weighted sum of its row.
    expected_M = a_MK.double() @ (b_KM.double() @ weight_M)

    def problem(product_MM: Tensor) -> str | None:
        wrong = int((product_MM.double() @ weight_M != expected_M).sum())
        return f"a matrix product was wrong in {wrong} of {M} rows" if wrong else None

    return Probe("matmul", lambda: a_MK @ b_KM, problem, is_local=True)


def partner_steps(hosts: Sequence[str]) -> list[int]:
    """Return up to four distances between partners, across hosts if there are several.

    A rank is judged by its fastest partner. With at least 4 ranks (or hosts), every rank has a
    partner that is not the slow one, so only the slow one stands out; with fewer, its partners do
    too.
    """
    per_host = hosts.count(hosts[0]) if len(set(hosts)) > 1 else 1
    return list(range(per_host, len(hosts), per_host))[:_MAX_PARTNERS]


def exchange(device: torch.device, step: int) -> Probe:
    """Send to the rank `step` after this one, and receive from the rank `step` before it."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    there, here = (rank + step) % num_ranks, (rank - step) % num_ranks
    sent = _part(device, _numel(device), rank, there)

    def run() -> Tensor:
        received = torch.full_like(sent, -1)
        both = [dist.P2POp(dist.isend, sent, there), dist.P2POp(dist.irecv, received, here)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        return received

    def problem(received: Tensor) -> str | None:
        right = received.equal(_part(device, len(received), here, rank))
        return None if right else f"received wrong data from rank {here}"

    return Probe("exchange", run, problem)


def all_to_all(device: torch.device) -> Probe:
    """Send a part from every rank to every rank."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    numel = _numel(device) // num_ranks
    sent = torch.cat([_part(device, numel, rank, other) for other in range(num_ranks)])

    def run() -> Tensor:
        received = torch.full_like(sent, -1)
        dist.all_to_all_single(received, sent)
        return received

    def problem(received: Tensor) -> str | None:
        parts = enumerate(received.split(numel))
        wrong = [r for r, x in parts if not x.equal(_part(device, numel, r, rank))]
        names = ", ".join(f"rank {r}" for r in wrong)
        return f"received wrong data from {names}" if wrong else None

    return Probe("all-to-all", run, problem, coupled=True)


def all_reduce(device: torch.device) -> Probe:
    """Sum (rank + 1) times the same values over all ranks."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    values = torch.arange(_numel(device), device=device) % 1009
    mine, expected = values * (rank + 1), values * (num_ranks * (num_ranks + 1) // 2)

    def run() -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    def problem(total: Tensor) -> str | None:
        wrong = int((total != expected).sum())
        return f"received a wrong sum in {wrong} of {len(total)} elements" if wrong else None

    return Probe("all-reduce", run, problem, coupled=True)


def _numel(device: torch.device) -> int:
    """Return the number of 8-byte integers that a rank sends, at least one to every rank."""
    size = 64 * _MIB if device.type == "cuda" else 2 * _MIB
    return max(size // 8, dist.get_world_size())


def _part(device: torch.device, numel: int, sender: int, receiver: int) -> Tensor:
    """Return values that identify their sender and receiver."""
    values = torch.arange(numel, device=device) % 1009
    return values + 1009 * (sender * dist.get_world_size() + receiver)
