"""Simulates a job of W ranks in one process by treating the other ranks as mirror images of it.

Every other rank is assumed to hold the same tokens and the same parameters, so this rank knows what
it would receive: sums are W times its own values, gathers are copies, and each rank of an
all-to-all contributes the block that this rank sends to itself. All sizes are those of a real job
in which every rank's data is routed like this one's. Values are plausible but wrong, because other
ranks hold other experts. Nothing is sent.

Used by `moa_dist.verify.dry_run` and by tests with more ranks than a machine could run.
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
"""Name under which the backend is registered."""


class _Done(dist.Work):
    """Work that is complete from the start."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return immediately."""
        return True

    def get_future(self) -> Future[Any]:
        """Return a future that is already set."""
        return self._future


class MirrorGroup(dist.ProcessGroup):
    """A process group of `size` ranks that all equal this one, which is number `rank`."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        """Return the backend's name, which torch asks for."""
        return BACKEND

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """Return immediately: no other rank exists."""
        return _Done([])

    def broadcast(self, tensors: Any, *_: Any) -> dist.Work:
        """Leave the tensors as they are: the source holds the same values."""
        return _Done(tensors)

    def allreduce(self, tensors: Any, options: Any = None, *_: Any) -> dist.Work:
        """Multiply sums by the number of ranks; other reductions leave the values unchanged."""
        if options is None or options.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._size)
        return _Done(tensors)

    def allgather(self, gathered: Any, tensors: Any, *_: Any) -> dist.Work:
        """Fill each rank's part with a copy of this rank's tensor."""
        for copies, tensor in zip(gathered, tensors, strict=True):
            for copy in copies:
                copy.copy_(tensor)
        return _Done(gathered)

    def all_gather_single(self, gathered: Tensor, tensor: Tensor, *_: Any) -> dist.Work:
        """Fill each rank's part with a copy of this rank's tensor."""
        for part in gathered.view(self._size, -1):  # one part may be `tensor` itself
            part.copy_(tensor.view(-1))
        return _Done([gathered])

    def reduce_scatter_single(self, part: Tensor, tensor: Tensor, *_: Any) -> dist.Work:
        """Multiply this rank's part by the number of ranks."""
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
        """Receive from each rank the block that this rank sends to itself.

        On the way back from the experts, block sizes differ because other ranks hold other
        experts: this rank's rows stand in for theirs, repeated as often as needed.
        """
        equal = [len(sent) // self._size] * self._size
        mine = sent.split(send_splits or equal)[self._rank]
        for block in received.split(recv_splits or equal):
            for part in block.split(len(mine)) if len(mine) else ():
                part.copy_(mine[: len(part)])
            if not len(mine):
                block.zero_()
        return _Done([received])

    # Names used by torch 2.11.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single
    alltoall_base: Any = all_to_all_single


def _create(_store: dist.Store, rank: int, size: int, _timeout: timedelta) -> MirrorGroup:
    return MirrorGroup(rank, size)


dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])


@contextmanager
def mirrored_job(rank: int, world_size: int) -> Iterator[DistContext]:
    """Act as `rank` of a job of `world_size` ranks whose other ranks mirror this one."""
    device = device_of(rank, local_rank=0)
    environment = ALONE | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with patched_environ(environment):
        dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=dist.HashStore())
        try:
            yield DistContext(rank, world_size, device, BACKEND)
        finally:
            dist.destroy_process_group()
