"""A job of W ranks of which only one exists: the others are taken to be its mirror images.

Every other rank is assumed to hold the same tokens and the same parameters, so this rank knows what
it would receive: sums are W times its own values, gathers are copies, and from each rank of an
all-to-all comes the block that this rank sends to itself. All sizes are those of the real job if
every rank's data were routed like this one's. Values are plausible, not right: other ranks hold
other experts. Nothing is sent.

Serves `moa_dist.verify.dry_run` and tests of more ranks than a machine could run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from moa_dist.distributed.start import ALONE, DistContext, device_of, patched_environ

BACKEND = "mirror"
"""Name of the backend."""


class _Done(dist.Work):
    """Work that is over."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """At once."""
        return True

    def get_future(self) -> Future[Any]:
        """Already set."""
        return self._future


class MirrorGroup(dist.ProcessGroup):
    """What `rank` of `size` equal ranks receives from the others."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        """As torch asks for it."""
        return BACKEND

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """Nobody to wait for."""
        return _Done([])

    def broadcast(self, tensors: Any, *_: Any) -> dist.Work:
        """The same values are here already."""
        return _Done(tensors)

    def allreduce(self, tensors: Any, options: Any = None, *_: Any) -> dist.Work:
        """Sums of as many equal values; other reductions leave them as they are."""
        if options is None or options.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._size)
        return _Done(tensors)

    def allgather(self, gathered: Any, tensors: Any, *_: Any) -> dist.Work:
        """Everybody's is this rank's."""
        for copies, tensor in zip(gathered, tensors, strict=True):
            for copy in copies:
                copy.copy_(tensor)
        return _Done(gathered)

    def all_gather_single(self, gathered: Tensor, tensor: Tensor, *_: Any) -> dist.Work:
        """Everybody's is this rank's."""
        for part in gathered.view(self._size, -1):  # one of which may be `tensor` itself
            part.copy_(tensor.view(-1))
        return _Done([gathered])

    def reduce_scatter_single(self, part: Tensor, tensor: Tensor, *_: Any) -> dist.Work:
        """Sum of as many equal parts."""
        mine = tensor.view(self._size, -1)[self._rank]
        torch.mul(mine, self._size, out=part.view(-1))
        return _Done([part])

    def all_to_all_single(
        self,
        received: Tensor,
        sent: Tensor,
        recv_splits: list[int],
        send_splits: list[int],
        *_: Any,
    ) -> dist.Work:
        """From each rank the block that this one sends to itself.

        On the way back from experts blocks have other sizes, for other ranks hold other experts:
        this rank's rows stand in for theirs, as often as it takes.
        """
        equal = [len(sent) // self._size] * self._size
        mine = sent.split(send_splits or equal)[self._rank]
        for block in received.split(recv_splits or equal):
            for part in block.split(len(mine)) if len(mine) else ():
                part.copy_(mine[: len(part)])
            if not len(mine):
                block.zero_()
        return _Done([received])

    # The names of torch 2.11.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single
    alltoall_base: Any = all_to_all_single


def _create(_store: dist.Store, rank: int, size: int, _timeout: timedelta) -> MirrorGroup:
    return MirrorGroup(rank, size)


dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])


@contextmanager
def mirrored_job(rank: int, world_size: int) -> Iterator[DistContext]:
    """Be `rank` of a job of `world_size` ranks, the others mirror images of this one."""
    device = device_of(rank, local_rank=0)
    environment = ALONE | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with patched_environ(environment):
        dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=dist.HashStore())
        try:
            yield DistContext(rank, world_size, device, BACKEND)
        finally:
            dist.destroy_process_group()
