"""Differentiable collectives that can overlap with computation.

Every rank of a group must enter them in the same order, even if it has nothing to send. Each is
split in two: starting it returns immediately, and `Pending.wait` returns the result. Autograd runs
the two halves in reverse: the gradient's collective starts where the result was awaited and is
awaited where the forward collective started, so whatever is computed between the two overlaps
with communication in both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.distributed.comm_group import CommGroup
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.pending import Pending
from moa_dist.distributed.traffic import Purpose, TrafficKey

_Started = tuple[Tensor, dist.Work | None]
"""The output buffer, and the work that fills it; None after a blocking collective."""


@dataclass
class _Collective:
    """A collective together with the one that returns its gradient."""

    start_forward: Callable[[Tensor], _Started]
    """Starts the forward collective on this rank's input."""
    start_backward: Callable[[Tensor], _Started]
    """Starts the collective for the gradient of the output."""
    comm_timer: CommTimer
    """Records the time spent waiting."""
    key: TrafficKey
    """Identifies the forward traffic."""
    in_flight: _Started | None = None
    """Set between the start and the end of either pass."""

    def start(self, sent: Tensor, *, backward: bool) -> Tensor:
        """Start the collective of one pass and return its output buffer, not yet filled."""
        begin = self.start_backward if backward else self.start_forward
        with self.comm_timer.begin(self.key._replace(backward=backward)):
            self.in_flight = begin(sent.contiguous())
        return self.in_flight[0]

    def finish(self, *, backward: bool) -> Tensor:
        """Wait for the collective, if it is asynchronous, and return the filled buffer."""
        assert self.in_flight is not None
        (buffer, work), self.in_flight = self.in_flight, None
        if work is not None:
            with self.comm_timer.wait(self.key._replace(backward=backward)):
                work.wait()
        return buffer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, collective: _Collective) -> Tensor:
        ctx.collective = collective
        return collective.start(sent, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.finish(backward=True), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, collective: _Collective) -> Tensor:
        ctx.collective = collective
        collective.finish(backward=False)
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.collective.start(grads[0], backward=True)
        # The value returned here is never read; it only has the shape that autograd expects. The
        # real gradient comes from _Begin.backward and has the shape of the input.
        return grads[0], None


def _start(sent: Tensor, collective: _Collective) -> Pending:
    return Pending(_Begin.apply(sent, collective), lambda buffer: _Wait.apply(buffer, collective))


def all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], comm_group: CommGroup, purpose: Purpose
) -> Pending:
    """Send `sent[p]` consecutive rows to each rank p and receive `received[p]` rows from it.

    `rows` [sum(sent), ...] -> [sum(received), ...] in rank order. The gradient of a row is the
    gradient of its copy on the receiving rank: nothing is summed or averaged here.
    """
    rank = comm_group.group.rank()

    def exchange(
        x: Tensor, send_splits: list[int], recv_splits: list[int], *, backward: bool
    ) -> _Started:
        out = x.new_empty(sum(recv_splits), *x.shape[1:])
        row_bytes = x.element_size() * x.shape[1:].numel()
        num_rows = sum(send_splits) - send_splits[rank]
        comm_group.count(purpose, num_rows * row_bytes, backward=backward)
        return out, dist.all_to_all_single(
            out, x, recv_splits, send_splits, group=comm_group.group, async_op=comm_group.overlap
        )

    return _start(
        rows,
        _Collective(
            start_forward=lambda x: exchange(x, sent, received, backward=False),
            start_backward=lambda grad: exchange(grad, received, sent, backward=True),
            comm_timer=comm_group.comm_timer,
            key=TrafficKey(comm_group.layer, purpose, backward=False),
        ),
    )


def all_to_all_counts(counts: Tensor, comm_group: CommGroup) -> Tensor:
    """Exchange `counts` [P, ...]: entry p is sent to rank p, entry q of the result is rank q's."""
    out = torch.empty_like(counts)
    comm_group.count("plan", counts[1:].nbytes)
    with comm_group.comm_timer.begin(TrafficKey(comm_group.layer, "plan", backward=False)):
        dist.all_to_all_single(out, counts.contiguous(), group=comm_group.group)
    return out


def all_gather_shards(shard: Tensor, sizes: list[int], comm_group: CommGroup) -> Pending:
    """Gather the first `sizes[rank]` rows of each rank's shard into [sum(sizes), ...].

    `shard` [max(sizes), ...] has the same shape on all ranks. The gradient is summed over the
    group and scattered back, in one reduce-scatter.
    """
    num_ranks = len(sizes)

    def gather(x: Tensor) -> _Started:
        out = x.new_empty(num_ranks * len(x), *x.shape[1:])
        comm_group.count("gather", (num_ranks - 1) * x.nbytes)
        # A detached alias: ZeRO 3 frees a parameter's memory after its module was called, when
        # the collective may still be reading it.
        return out, dist.all_gather_into_tensor(
            out, x.detach(), group=comm_group.group, async_op=comm_group.overlap
        )

    def scatter(grad: Tensor) -> _Started:
        mine = grad.new_empty(len(grad) // num_ranks, *grad.shape[1:])
        comm_group.count("gather", (num_ranks - 1) * mine.nbytes, backward=True)
        return mine, dist.reduce_scatter_tensor(
            mine, grad, group=comm_group.group, async_op=comm_group.overlap
        )

    def without_padding(gathered: Tensor) -> Tensor:
        if len(set(sizes)) == 1:
            return gathered
        shards = gathered.split(max(sizes))
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    key = TrafficKey(comm_group.layer, "gather", backward=False)
    collective = _Collective(
        start_forward=gather, start_backward=scatter, comm_timer=comm_group.comm_timer, key=key
    )
    return _start(shard, collective).then(without_padding)


def sum_over_ranks(parts: list[Tensor], comm_timer: CommTimer, what: str) -> list[Tensor]:
    """Sum each tensor over all ranks, without gradient, in one collective named `what`.

    The sums are computed in fp64, so integers are exact up to 2^53. Shapes must be equal on all
    ranks.
    """
    flat = torch.cat([part.detach().double().flatten() for part in parts])
    with comm_timer.begin(what):
        dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [s.view_as(part).to(part.dtype) for s, part in zip(sums, parts, strict=True)]
