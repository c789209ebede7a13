"""The ranks of a job: what each says of itself, their clocks, and what they take for known work."""

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
"""How often each probe is timed; the best counts, since disturbances only ever slow down."""


def check_ranks(context: DistContext, own: Sequence[Finding]) -> Iterator[Finding]:
    """Findings about all ranks, the same on each of them. Collective.

    Args:
        job: that this process has joined.
        own: what this rank found by itself; those of rank 0 are known to its reader already.
    """
    reports: list[RankReport] = gather(RankReport(host_name(), facts(context), own))
    hosts = [report.host for report in reports]
    yield from compare.others_findings(reports)
    yield from compare.alike(reports)
    yield from compare.clocks(clock_offsets(), hosts)
    measured = measure(all_probes(context.device, hosts), context.device)
    yield from judge(gather(measured), hosts)
    # Now that they have worked: idle clocks and temperatures say little.
    gpus = guarded(
        "gpu",
        lambda: check_gpus([context.device] if context.device.type == "cuda" else []),
    )
    gathered = gather(gpus)
    yield from gathered[0]
    health = [RankReport(h, {}, found) for h, found in zip(hosts, gathered, strict=True)]
    yield from compare.others_findings(health)


def facts(context: DistContext) -> dict[str, str]:
    """What must be the same on every rank."""
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
    """Everybody's `value`, by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clock_offsets(rounds: int = 5) -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's. Collective.

    All leave a barrier at about the same time; of several, the one with the least difference.
    """
    times = []
    for _ in range(rounds):
        dist.barrier()
        times.append(time.time())
    first, *_ = everybody = gather(times)
    return [
        min((own - zero for own, zero in zip(rank, first, strict=True)), key=abs)
        for rank in everybody
    ]


@dataclass(frozen=True)
class Measured:
    """One rank's part in one probe."""

    name: str
    """The probe's."""
    coupled: bool
    """The probe's."""
    seconds: float
    """The best time; infinite if there is none."""
    problem: str | None
    """What was wrong with a result."""


def measure(probes: Sequence[Probe], device: torch.device, rounds: int = ROUNDS) -> list[Measured]:
    """Time the probes on this rank, in turns; probes of the same name count as one. Collective.

    All ranks begin at the same time, and no rank's time includes waiting for that: a rank that
    computes slowly is late for the next one, but makes no other look slow.
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
                    raise  # the other ranks wait in it; the job ends, and says by whom
                seconds, problem = math.inf, f"failed: {type(error).__name__}: {error}"
            problems[probe.name] = problems[probe.name] or problem
            if number:  # the first time something is set up
                best[probe.name] = min(best[probe.name], seconds)
    coupled = {probe.name: probe.coupled for probe in probes}
    return [Measured(name, coupled[name], best[name], problems[name]) for name in best]


def judge(by_rank: Sequence[Sequence[Measured]], hosts: Sequence[str]) -> Iterator[Finding]:
    """Who computed wrongly and who is slow, from `measure` of every rank."""
    for parts in zip(*by_rank, strict=True):
        name, coupled = parts[0].name, parts[0].coupled
        yield from compare.results(name, [part.problem for part in parts], hosts)
        times = [part.seconds for part in parts]
        if all(math.isfinite(seconds) for seconds in times):
            yield from compare.speed(name, times, hosts, coupled=coupled)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
