"""Work with a known answer, to be timed on every rank.

Values are small integers, so every answer is exact in any precision and any order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

_MIB = 2**20
_MOST_PARTNERS = 4


@dataclass(frozen=True)
class Probe:
    """One piece of work."""

    name: str
    """What it is called in the report."""
    run: Callable[[], Tensor]
    """Does it; this is what is timed."""
    problem: Callable[[Tensor], str | None]
    """What is wrong with the result, None if nothing is."""
    is_local: bool = False
    """It asks nothing of other ranks, so it may fail on one of them alone."""
    coupled: bool = False
    """Every rank waits for the slowest one, whose time it then shows too."""


def all_probes(device: torch.device, hosts: Sequence[str]) -> list[Probe]:
    """What the doctor times; `hosts` is by rank."""
    exchanges = [exchange(device, step) for step in partner_steps(hosts)]
    return [matmul(device), *exchanges, all_to_all(device), all_reduce(device)]


def matmul(device: torch.device) -> Probe:
    """[M, K] times [K, M]: on a GPU, by its tensor cores."""
    is_gpu = device.type == "cuda"
    # On a CPU it takes longer than a turn of the scheduler's (some ms): else the best of ten would
    # be one in which whatever shares the core did not run, and nothing would show.
    M, K, dtype = (8192, 2048, torch.bfloat16) if is_gpu else (1024, 2048, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randint, device=device, generator=generator)
    # Sums of K products of -1, 0 and 1 stay below 256 (8 standard deviations), exact in bf16.
    a_MK, b_KM = (draw(-1, 2, shape).to(dtype) for shape in ((M, K), (K, M)))
    weight_M = draw(1, 100, (M,)).double()
    # One wrong element shows in the weighted sum of its row.
    expected_M = a_MK.double() @ (b_KM.double() @ weight_M)

    def problem(product_MM: Tensor) -> str | None:
        wrong = int((product_MM.double() @ weight_M != expected_M).sum())
        return f"a matrix product was wrong in {wrong} of {M} rows" if wrong else None

    return Probe("matmul", lambda: a_MK @ b_KM, problem, is_local=True)


def partner_steps(hosts: Sequence[str]) -> list[int]:
    """How far apart partners are, at most four distances, across hosts if there are several.

    A rank is judged by its best partner. With 4 ranks or more, or as many hosts, everybody has one
    that is not the slow one, so only that one looks slow; with fewer, its partners do too.
    """
    per_host = hosts.count(hosts[0]) if len(set(hosts)) > 1 else 1
    return list(range(per_host, len(hosts), per_host))[:_MOST_PARTNERS]


def exchange(device: torch.device, step: int) -> Probe:
    """Each rank sends to the one `step` further, and waits for no other than its two partners."""
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
        return None if right else f"got wrong data from rank {here}"

    return Probe("exchange", run, problem)


def all_to_all(device: torch.device) -> Probe:
    """Every rank sends a part to every rank."""
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
        return f"got wrong data from {', '.join(f'rank {r}' for r in wrong)}" if wrong else None

    return Probe("all-to-all", run, problem, coupled=True)


def all_reduce(device: torch.device) -> Probe:
    """The sum over all ranks of (rank + 1) times the same values."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    values = torch.arange(_numel(device), device=device) % 1009
    mine, expected = values * (rank + 1), values * (num_ranks * (num_ranks + 1) // 2)

    def run() -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    def problem(total: Tensor) -> str | None:
        wrong = int((total != expected).sum())
        return f"got a wrong sum in {wrong} of {len(total)} elements" if wrong else None

    return Probe("all-reduce", run, problem, coupled=True)


def _numel(device: torch.device) -> int:
    """Integers of 8 bytes that a rank sends, at least one to everybody."""
    size = 64 * _MIB if device.type == "cuda" else 2 * _MIB
    return max(size // 8, dist.get_world_size())


def _part(device: torch.device, numel: int, sender: int, receiver: int) -> Tensor:
    """Values that tell who sent them to whom."""
    values = torch.arange(numel, device=device) % 1009
    return values + 1009 * (sender * dist.get_world_size() + receiver)
