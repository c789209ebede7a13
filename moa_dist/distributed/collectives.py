"""Collectives that carry gradients, and that computation may overlap.

Every rank of a group must enter them in the same order, also with nothing to send. Each comes in
two parts: what begins it returns at once, and `Pending.wait` gives the result. Autograd runs the
parts backwards: the gradient sets out where the result was waited for, and is waited for where
the collective began, so whatever was computed between the two overlaps it in both passes.
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

_Begun = tuple[Tensor, dist.Work | None]
"""The buffer that fills, and whom to wait for."""


@dataclass
class _Flight:
    """One collective, and the one by which its gradient comes back."""

    begin: Callable[[Tensor], _Begun]
    """Starts the collective with what this rank sends."""
    begin_backward: Callable[[Tensor], _Begun]
    """The same for the gradient."""
    comm_timer: CommTimer
    """Where waiting is counted."""
    key: TrafficKey
    """What travels, in the forward pass."""
    under_way: _Begun | None = None
    """Between its two parts, of either pass."""

    def set_out(self, sent: Tensor, *, backward: bool) -> Tensor:
        """Start the collective of one pass; the buffer that fills."""
        begin = self.begin_backward if backward else self.begin
        with self.comm_timer.begin(self.key._replace(backward=backward)):
            self.under_way = begin(sent.contiguous())
        return self.under_way[0]

    def land(self, *, backward: bool) -> Tensor:
        """Wait, unless the collective was a blocking one; the filled buffer."""
        assert self.under_way is not None
        (buffer, work), self.under_way = self.under_way, None
        if work is not None:
            with self.comm_timer.wait(self.key._replace(backward=backward)):
                work.wait()
        return buffer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.set_out(sent, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(backward=True), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.land(backward=False)
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.set_out(grads[0], backward=True)
        # Nobody reads what is returned, it only has the shape that autograd expects here: the
        # gradient that _Begin.backward returns has the shape of what was sent.
        return grads[0], None


def _depart(sent: Tensor, flight: _Flight) -> Pending:
    return Pending(_Begin.apply(sent, flight), lambda buffer: _Wait.apply(buffer, flight))


def all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], comm_group: CommGroup, purpose: Purpose
) -> Pending:
    """Send `sent[p]` consecutive rows to each rank p, get `received[p]` from it.

    `rows` [sum(sent), ...] -> [sum(received), ...] in rank order. The gradient of a row is
    the gradient at the place where it arrived: nothing is summed or averaged here.
    """
    rank = comm_group.group.rank()

    def exchange(
        x: Tensor, send_splits: list[int], recv_splits: list[int], *, backward: bool
    ) -> _Begun:
        out = x.new_empty(sum(recv_splits), *x.shape[1:])
        row_bytes = x.element_size() * x.shape[1:].numel()
        num_rows = sum(send_splits) - send_splits[rank]
        comm_group.count(purpose, num_rows * row_bytes, backward=backward)
        return out, dist.all_to_all_single(
            out, x, recv_splits, send_splits, group=comm_group.group, async_op=comm_group.overlap
        )

    return _depart(
        rows,
        _Flight(
            begin=lambda x: exchange(x, sent, received, backward=False),
            begin_backward=lambda grad: exchange(grad, received, sent, backward=True),
            comm_timer=comm_group.comm_timer,
            key=TrafficKey(comm_group.layer, purpose, backward=False),
        ),
    )


def all_to_all_counts(counts: Tensor, comm_group: CommGroup) -> Tensor:
    """[P, ...] -> [P, ...]: entry p goes to rank p, entry q of the result came from rank q."""
    out = torch.empty_like(counts)
    comm_group.count("plan", counts[1:].nbytes)
    with comm_group.comm_timer.begin(TrafficKey(comm_group.layer, "plan", backward=False)):
        dist.all_to_all_single(out, counts.contiguous(), group=comm_group.group)
    return out


def all_gather_shards(shard: Tensor, sizes: list[int], comm_group: CommGroup) -> Pending:
    """The first `sizes[rank]` rows of each rank's shard -> [sum(sizes), ...], in rank order.

    `shard` [max(sizes), ...] has one shape on all ranks. The gradient is summed over the group
    and scattered back, in one collective.
    """
    num_ranks = len(sizes)

    def gather(x: Tensor) -> _Begun:
        out = x.new_empty(num_ranks * len(x), *x.shape[1:])
        comm_group.count("gather", (num_ranks - 1) * x.nbytes)
        # Detached, an alias of its own: ZeRO 3 takes a parameter's memory away once its module
        # has been called, and the collective may still read it.
        return out, dist.all_gather_into_tensor(
            out, x.detach(), group=comm_group.group, async_op=comm_group.overlap
        )

    def scatter(grad: Tensor) -> _Begun:
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
    flight = _Flight(
        begin=gather, begin_backward=scatter, comm_timer=comm_group.comm_timer, key=key
    )
    return _depart(shard, flight).then(without_padding)


def sum_over_ranks(parts: list[Tensor], comm_timer: CommTimer, what: str) -> list[Tensor]:
    """Each tensor summed over all ranks, without gradient, in one collective called `what`.

    Adds up in fp64, so integers are exact to 2^53. Shapes must be equal on all ranks.
    """
    flat = torch.cat([part.detach().double().flatten() for part in parts])
    with comm_timer.begin(what):
        dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [s.view_as(part).to(part.dtype) for s, part in zip(sums, parts, strict=True)]
