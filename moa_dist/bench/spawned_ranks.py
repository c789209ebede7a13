"""Runs sections that need several ranks, in an existing job or in one that is started here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from moa_dist.bench.measure import Table, Work
from moa_dist.bench.sections import load_shared_section
from moa_dist.bench.setting import Setting
from moa_dist.config.checks import check_fields
from moa_dist.config.run import Config
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.network import free_port
from moa_dist.distributed.start import DistContext, init_distributed, patched_environ
from moa_dist.errors import ClusterError, ConfigError, MoaDistError

Found = tuple[str, Table]
"""A section's name and a table that it measured."""
LOOPBACK = "127.0.0.1"
_LOOK_S = 1.0


def in_this_job(names: Sequence[str], setting: Setting) -> Iterator[Found]:
    """Measure together with all ranks of this process's job; yields tables on rank 0 only."""
    with init_distributed() as context:
        yield from _measure(names, setting, context)


def in_a_job(names: Sequence[str], setting: Setting, ranks: int, threads: int) -> Iterator[Found]:
    """Start `ranks` processes on this machine and measure; yields their tables.

    Raises ClusterError with a rank's message if that rank fails; the others are then terminated.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    arguments = (ranks, free_port(LOOPBACK), threads, list(names), setting, sender)
    with patched_environ({"CUDA_VISIBLE_DEVICES": ""} if setting.device.type == "cpu" else {}):
        started = multiprocessing.start_processes(
            _rank_main, arguments, nprocs=ranks, join=False, start_method="spawn"
        )
    assert started is not None
    sender.close()  # the ranks hold copies: it closes with the last of them
    try:
        while (received := _received(receiver, started)) is not None:
            if isinstance(received, str):
                raise ClusterError(received)
            yield received
        while not started.join():
            pass
    except ProcessException as error:
        raise ClusterError(f"rank {error.error_index} of {ranks} failed: {error}") from error
    finally:
        for process in started.processes:
            process.join(_LOOK_S)
            process.terminate()


def _received(receiver: Connection, started: ProcessContext) -> Found | str | None:
    """Return a table, or a rank's error message; None after the last rank has exited."""
    while not receiver.poll(_LOOK_S):
        started.join(0)  # raises if a rank has failed
    try:
        received: Found | str = receiver.recv()
    except EOFError:
        return None
    return received


def _rank_main(
    rank: int,
    ranks: int,
    port: int,
    threads: int,
    names: Sequence[str],
    setting: Setting,
    sender: Connection,
) -> None:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(threads)
    with patched_environ(environment):
        try:
            for found in in_this_job(names, setting):
                sender.send(found)
        except MoaDistError as error:
            sender.send(f"rank {rank} of {ranks}: {error}")


def _measure(names: Sequence[str], setting: Setting, context: DistContext) -> Iterator[Found]:
    setting = replace(setting, device=context.device, seed=context.rank)
    mesh = make_mesh(_expert_parallel(setting.config, context.world_size))
    problems = check_fields(setting.on(mesh))
    if problems:
        raise ConfigError(problems, setting.config.name)
    on_cpu = setting.device.type == "cpu"
    threads = f", each with {torch.get_num_threads()} threads" if on_cpu else ""
    layout = f"{mesh.world_size} ranks, ep {mesh.expert_parallel}{threads}"
    for name in names:
        for table in load_shared_section(name)(setting, mesh):
            if mesh.rank == 0:
                yield name, replace(table, notes=[*table.notes, layout])


def _expert_parallel(config: Config, world_size: int) -> int:
    """Return the part of the configured expert parallelism that divides the ranks, or all ranks."""
    has_experts = bool(config.model.routed_parts())
    common = gcd(config.parallel.expert_parallel, world_size)
    return world_size if common == 1 and has_experts else common


def together(once: Work) -> Work:
    """Return work with a barrier before and after it, which starts and ends on all ranks alike."""

    def on_all() -> None:
        dist.barrier()
        once()
        dist.barrier()

    return on_all
