"""Checks across the ranks of a job: their own findings, versions, clocks and speed."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moa_dist.distributed.network import host_name
from moa_dist.distributed.start import DistContext
from moa_dist.doctor import compare
from moa_dist.doctor.compare import RankReport
from moa_dist.doctor.environment import nccl_version
from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.gpu import check_gpus, driver_version
from moa_dist.doctor.packages import package_versions
from moa_dist.doctor.probes import Probe, all_probes
from moa_dist.provenance import code_hash

ROUNDS = 10
"""How often each probe is timed; the best time counts, since disturbances only slow it down."""


def check_ranks(context: DistContext, own: Sequence[Finding]) -> Iterator[Finding]:
    """Check all ranks; the findings are the same on each of them. Collective.

    Args:
        context: The job that this process has joined.
        own: Findings of this rank's own checks; those of rank 0 have been printed already.
    """
    reports: list[RankReport] = gather(RankReport(host_name(), facts(context), own))
    hosts = [report.host for report in reports]
    yield from compare.others_findings(reports)
    yield from compare.versions(reports)
    yield from compare.clocks(clock_offsets(), hosts)
    measured = measure(all_probes(context.device, hosts), context.device)
    yield from judge(gather(measured), hosts)
    # After the work, since clocks and temperatures of idle GPUs say little.
    gpus = guarded(
        "gpu",
        lambda: check_gpus([context.device] if context.device.type == "cuda" else []),
    )
    gathered = gather(gpus)
    yield from gathered[0]
    health = [RankReport(h, {}, found) for h, found in zip(hosts, gathered, strict=True)]
    yield from compare.others_findings(health)


def facts(context: DistContext) -> dict[str, str]:
    """Return the versions that must be the same on every rank."""
    is_gpu = context.device.type == "cuda"
    return {
        "code": code_hash(),
        "Python": platform.python_version(),
        **package_versions(),
        "CUDA": torch.version.cuda or "none",
        "NCCL": nccl_version(),
        "driver": driver_version(),
        "device": torch.cuda.get_device_name(context.device) if is_gpu else "CPU",
    }


def gather(value: Any) -> list[Any]:
    """Return every rank's `value`, by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clock_offsets(rounds: int = 5) -> list[float]:
    """Return how many seconds each rank's clock is ahead of rank 0's. Collective.

    All ranks leave a barrier at about the same time; of several rounds, the smallest offset
    counts.
    """
    times = []
    for _ in range(rounds):
        dist.barrier()
        times.append(time.time())
    by_rank = gather(times)
    return [
        min((own - zero for own, zero in zip(rank, by_rank[0], strict=True)), key=abs)
        for rank in by_rank
    ]


@dataclass(frozen=True)
class Measured:
    """One rank's measurement of one probe."""

    name: str
    """Name of the probe."""
    coupled: bool
    """Whether every rank waits for the slowest one."""
    seconds: float
    """The best time; infinite if it never succeeded."""
    problem: str | None
    """What was wrong with a result; None if all were correct."""


def measure(probes: Sequence[Probe], device: torch.device, rounds: int = ROUNDS) -> list[Measured]:
    """Time the probes on this rank, in turns; probes of the same name count as one. Collective.

    All ranks start each probe together, and the wait for that is not timed: a rank that computes
    slowly is late for the next probe, but does not make other ranks look slow.
    """
    best = {probe.name: math.inf for probe in probes}
    problems: dict[str, str | None] = dict.fromkeys(best)
    for number in range(rounds + 1):
        for probe in probes:
            dist.barrier()
            _synchronize(device)
            start = time.perf_counter()
            try:
                result = probe.run()
                _synchronize(device)
                seconds = time.perf_counter() - start
                problem = probe.problem(result)
            except Exception as error:
                if not probe.is_local:
                    raise  # the other ranks are waiting in it; the job ends and names this rank
                seconds, problem = math.inf, f"failed: {type(error).__name__}: {error}"
            problems[probe.name] = problems[probe.name] or problem
            if number:  # the first round includes set-up work
                best[probe.name] = min(best[probe.name], seconds)
    coupled = {probe.name: probe.coupled for probe in probes}
    return [Measured(name, coupled[name], best[name], problems[name]) for name in best]


def judge(by_rank: Sequence[Sequence[Measured]], hosts: Sequence[str]) -> Iterator[Finding]:
    """Report ranks with wrong results and slow ranks, from every rank's measurements."""
    for parts in zip(*by_rank, strict=True):
        name, coupled = parts[0].name, parts[0].coupled
        yield from compare.results(name, [part.problem for part in parts], hosts)
        times = [part.seconds for part in parts]
        if all(math.isfinite(seconds) for seconds in times):
            yield from compare.speed(name, times, hosts, coupled=coupled)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
