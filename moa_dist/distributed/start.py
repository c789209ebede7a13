"""Joining and leaving a job, whichever launcher started the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moa_dist.distributed.device import default_device
from moa_dist.distributed.heartbeat import Heartbeat, heartbeat
from moa_dist.distributed.store import local_store
from moa_dist.errors import ClusterError, PeerError, PeerErrorKind

TIMEOUT = timedelta(minutes=10)
"""Longest wait for other ranks in one collective before the job fails."""

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
"""Environment of a job with a single rank; port 0 lets the system pick a free one."""


@dataclass(frozen=True)
class DistContext:
    """This rank's identity in the job, its device and its communication backend."""

    rank: int
    """0 ... world_size - 1."""
    world_size: int
    """Number of ranks (W)."""
    device: torch.device
    """The device that this rank computes on."""
    backend: str
    """`nccl`, `gloo`, or the name of `moa_dist.distributed.mirror`."""
    heartbeat: Heartbeat | None = None
    """Monitors the other ranks; None in a job of one rank."""


@contextmanager
def patched_environ(environment: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the context is open, as a launcher would have set them."""
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
    """Select the rank's GPU as torch's current device; returns the CPU on a machine without GPUs.

    Raises:
        ClusterError: Torch cannot use the GPUs of this machine, or it has fewer than ranks.
    """
    if default_device().type == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ClusterError(
            f"rank {rank} is process {local_rank + 1} on its node, which has only "
            f"{torch.cuda.device_count()} GPUs: start fewer processes per node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def init_distributed() -> Iterator[DistContext]:
    """Join the job in which `deepspeed`, `torchrun` or plain `python` started this process.

    With GPUs, each rank uses the device of its LOCAL_RANK and communicates through NCCL; without
    GPUs it uses the CPU and gloo. If a rank is lost while the context is open, all others end
    within a minute with a PeerError that names it. On exit the rank leaves the job.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise ClusterError(
                "SLURM_NTASKS is greater than 1 but RANK is not set: start one task per node, and "
                "run `deepspeed` or `torchrun` in it"
            )
        with patched_environ(ALONE), init_distributed() as alone:
            yield alone
        return
    missing = [name for name in ALONE if name not in os.environ]
    if missing:
        raise ClusterError(
            f"RANK is set but not {', '.join(missing)}: start with `deepspeed` or `torchrun`"
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
            "every rank was started, that the address is reachable and that the port is free",
            PeerErrorKind.ABSENT,
        ) from error
    with heartbeat(device) as monitor:
        yield DistContext(rank, world_size, device, backend, monitor)
    # Not after an error: other ranks may be inside a collective, and waiting for them would keep
    # this process from exiting, which is what makes its launcher end the others.
    dist.destroy_process_group()
