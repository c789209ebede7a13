"""Sections that several ranks measure together: in their job, or in one that is started here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException

from moa_dist.bench.measure import Table, Work
from moa_dist.bench.sections import load_shared_section
from moa_dist.bench.setting import Setting
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.network import free_port
from moa_dist.distributed.start import Job, job, told
from moa_dist.errors import ClusterError, MoaDistError

LOOPBACK = "127.0.0.1"


def in_this_job(names: Sequence[str], setting: Setting) -> Iterator[tuple[str, Table]]:
    """Measure, once every rank of this process's job does; section and table, on rank 0 alone."""
    # DeepSpeed 0.19 calls collectives by names that torch is renaming; nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with job() as this_job:
        yield from _measure(names, setting, this_job)


def in_a_job(
    names: Sequence[str], setting: Setting, ranks: int, threads: int
) -> Iterator[tuple[str, Table]]:
    """Start that many ranks on this machine and measure; section and table.

    Raises ClusterError, with what they said, if one of them cannot go on.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    processes = multiprocessing.start_processes(
        _rank_main,
        (ranks, free_port(LOOPBACK), threads, list(names), setting, sender),
        nprocs=ranks,
        join=False,
        start_method="spawn",
    )
    assert processes is not None
    sender.close()  # the ranks hold it: it ends with the last of them
    said = []
    with contextlib.suppress(EOFError):
        while True:
            received = receiver.recv()
            if isinstance(received, str):
                said.append(received)
            else:
                yield received
    try:
        while not processes.join():
            pass
    except ProcessException as error:
        said.append(f"rank {error.error_index} failed: {error}")
    if said:
        raise ClusterError("\n".join(sorted(said)))


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
    with told(environment):
        try:
            for found in in_this_job(names, setting):
                sender.send(found)
        except MoaDistError as error:
            sender.send(f"rank {rank} of {ranks}: {error}")


def _measure(names: Sequence[str], setting: Setting, this_job: Job) -> Iterator[tuple[str, Table]]:
    setting = replace(setting, device=this_job.device)
    wanted = setting.config.parallel.expert_parallel
    fits = wanted > 1 and this_job.world_size % wanted == 0
    mesh = make_mesh(wanted if fits else this_job.world_size)
    for name in names:
        for table in load_shared_section(name)(setting, mesh):
            if mesh.rank == 0:
                yield name, table


def together(once: Work) -> Work:
    """Work that ends when it has ended on all ranks, and begins so."""

    def on_all() -> None:
        dist.barrier()
        once()
        dist.barrier()

    return on_all
