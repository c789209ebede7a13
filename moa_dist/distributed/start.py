"""Starting and ending a rank's part in a job, whichever launcher started the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moa_dist.distributed.heartbeat import Heartbeat, heartbeat
from moa_dist.distributed.store import local_store
from moa_dist.errors import ClusterError, PeerError

TIMEOUT = timedelta(minutes=10)
"""Longest wait for other ranks in one collective before the job fails."""

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
"""Environment of a job of one rank; port 0 lets the system pick a free one."""


@dataclass(frozen=True)
class DistContext:
    """What this rank is and computes on."""

    rank: int
    """0 ... world_size - 1."""
    world_size: int
    """Ranks (W)."""
    device: torch.device
    """This rank's device."""
    backend: str
    """`nccl`, `gloo`, or that of `moa_dist.distributed.mirror`."""
    beat: Heartbeat | None = None
    """Connections to the other ranks; None if there are none."""


@contextmanager
def patched_environ(environment: dict[str, str]) -> Iterator[None]:
    """While open, these environment variables are as a launcher would have set them."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def device_of(rank: int, local_rank: int) -> torch.device:
    """The GPU that a rank takes, made torch's current one, or the CPU where there are none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ClusterError(
            f"rank {rank} is process {local_rank + 1} of its node, which has "
            f"{torch.cuda.device_count()} GPUs: start fewer processes per node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def init_distributed() -> Iterator[DistContext]:
    """Join the job that `deepspeed`, `torchrun` or plain `python` started this process in.

    On GPUs each rank takes the device of its LOCAL_RANK and talks through NCCL; without
    GPUs it computes on the CPU and talks through gloo. A rank that is lost meanwhile ends all
    others within a minute, with a PeerError that names it. Leaves the job at the end.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise ClusterError(
                "several tasks were started, but none was told its rank: start one task per node, "
                "and in it `deepspeed` or `torchrun`"
            )
        with patched_environ(ALONE), init_distributed() as alone:
            yield alone
        return
    missing = [name for name in ALONE if name not in os.environ]
    if missing:
        raise ClusterError(
            f"RANK is set but {', '.join(missing)} is not: start with `deepspeed` or `torchrun`"
        )
    rank, local_rank, world_size = (
        int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    device = device_of(rank, local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=TIMEOUT,
            store=local_store(rank, world_size, TIMEOUT),
            rank=rank,
            world_size=world_size,
            device_id=device if backend == "nccl" else None,
        )
    except (dist.DistError, OSError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerError(
            f"rank {rank} of {world_size} could not join the job at {where}: {error}. Check that "
            "every rank was started, that the address is reachable and that the port is free"
        ) from error
    with heartbeat(device) as beat:
        yield DistContext(rank, world_size, device, backend, beat)
    # Not after an error: other ranks may be inside a collective, and waiting for them here would
    # keep this process from ending, by which its launcher ends the others.
    dist.destroy_process_group()
