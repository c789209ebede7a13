"""A backend over gloo that enforces what NCCL demands, on CPUs.

Gloo forgives: it often runs at once, and takes every type. Here a collective owns its buffers from
its begin to its wait: outputs hold poison until then, and whoever writes to a buffer is found out.
Types, layouts and reductions are those of NCCL, and `LOG` lists what this rank has entered, so that
ranks can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "nccl_rules"
DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip
"""What NCCL sends."""
REDUCTIONS = ("SUM", "PRODUCT", "MIN", "MAX", "AVG")
"""What NCCL reduces by."""
OBJECTS = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "monitored_barrier",
)
"""Collectives that copy to the host, or that NCCL lacks."""


class Entry(NamedTuple):
    """A collective that this rank has entered."""

    group: tuple[tuple[int, ...], int]
    """The group: its ranks, and how many groups of these ranks came before."""
    name: str
    details: tuple[Any, ...]
    """What must be equal on all ranks of the group."""
    sent: tuple[int, ...] = ()
    """Sizes sent to each rank of an all-to-all."""
    received: tuple[int, ...] = ()
    """Sizes received from each rank of an all-to-all."""


LOG: list[Entry] = []
BROKEN: list[str] = []
"""Rules that this rank has broken."""
NUMBERS: dict[tuple[int, ...], int] = {}
"""How many groups of some ranks this rank has joined."""
UNFINISHED: set[int] = set()
"""Collectives that nobody has waited for."""


def _reduction(name: str, options: Any) -> str:
    for reduction in REDUCTIONS:
        if options.reduceOp == getattr(dist.ReduceOp, reduction):
            return reduction
    BROKEN.append(f"{name}: NCCL does not reduce by {options.reduceOp}")
    return "other"


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def poison(tensor: Tensor) -> None:
    tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1)


class _Work(dist.Work):
    """Returns the buffers to their owner when it waits."""

    def __init__(self, what: str, gloo: dist.Work | None, kept: list[Any], out: list[Any]) -> None:
        super().__init__()
        self._what, self._gloo, self._kept, self._out = what, gloo, kept, out
        UNFINISHED.add(id(self))

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Check that nobody has touched the buffers, then fill the outputs."""
        if id(self) not in UNFINISHED:
            return True
        UNFINISHED.remove(id(self))
        if self._gloo is not None:
            self._gloo.wait()
        for tensor, version, held in self._kept:
            if tensor._version != version or not torch.equal(bytes_of(tensor), held):
                BROKEN.append(f"{self._what}: a buffer was written to before the wait")
        for tensor, result in self._out:
            tensor.data.copy_(result)
        return True

    def is_completed(self) -> bool:
        return id(self) not in UNFINISHED


class RuleGroup(dist.ProcessGroup):
    """A process group of gloo's under NCCL's rules."""

    def __init__(self, options: Any) -> None:
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)
        ranks = tuple(options.global_ranks_in_group) or tuple(range(size))
        number = NUMBERS[ranks] = NUMBERS.get(ranks, -1) + 1
        self._key = (ranks, number)
        self._name = options.group_id
        self._gloo = dist.ProcessGroupGloo(options.store, rank, size, options.timeout)

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def _enter(
        self,
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        start: Callable[[list[Tensor], list[Tensor]], dist.Work],
        details: tuple[Any, ...] = (),
        **sizes: tuple[int, ...],
    ) -> dist.Work:
        """Start a collective on copies; its own buffers are not available until the wait."""
        for tensor in (*inputs, *outputs):
            if tensor.dtype not in DTYPES:
                BROKEN.append(f"{name}: NCCL does not send {tensor.dtype}")
            if not tensor.is_contiguous():
                BROKEN.append(f"{name}: a tensor is not contiguous")
        dtypes = tuple({str(tensor.dtype) for tensor in (*inputs, *outputs)})
        if len(dtypes) > 1:
            BROKEN.append(f"{name}: mixes {dtypes}")
        LOG.append(Entry(self._key, name, (*details, *dtypes), **sizes))
        copies = [tensor.detach().clone() for tensor in inputs]
        results = [torch.empty_like(tensor) for tensor in outputs]
        for result, tensor in zip(results, outputs, strict=True):
            result.copy_(tensor.detach())
            poison(tensor)
        # Those that are outputs too, or part of one, are poisoned by now.
        kept = [(t, t._version, bytes_of(t).clone()) for t in (*inputs, *outputs)]
        out = list(zip(outputs, results, strict=True))
        return _Work(name, start(copies, results), kept, out)

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        LOG.append(Entry(self._key, "barrier", ()))
        return self._gloo.barrier()

    def broadcast(self, tensors: Any, options: Any) -> dist.Work:
        (tensor,) = tensors
        return self._enter(
            "broadcast",
            [],
            [tensor],
            lambda _, out: self._gloo.broadcast(out, options),
            (options.rootRank, tensor.numel()),
        )

    def _reduced(self, name: str, tensors: Any, options: Any, *details: Any) -> dist.Work:
        (tensor,) = tensors
        start = getattr(self._gloo, name)
        return self._enter(
            name,
            [],
            [tensor],
            lambda _, out: start(out, options),
            (_reduction(name, options), tensor.numel(), *details),
        )

    def allreduce(self, tensors: Any, options: Any) -> dist.Work:
        return self._reduced("allreduce", tensors, options)

    def reduce(self, tensors: Any, options: Any) -> dist.Work:
        return self._reduced("reduce", tensors, options, options.rootRank)

    def allgather(self, gathered: Any, tensors: Any, options: Any) -> dist.Work:
        (outputs,), (tensor,) = gathered, tensors
        if {output.numel() for output in outputs} != {tensor.numel()}:
            BROKEN.append("allgather: sizes differ")
        return self._enter(
            "allgather",
            [tensor],
            outputs,
            lambda own, out: self._gloo.allgather([out], own, options),
            (tensor.numel(),),
        )

    def all_gather_single(self, gathered: Tensor, tensor: Tensor, options: Any) -> dist.Work:
        if gathered.numel() != tensor.numel() * self.size():
            BROKEN.append("all_gather_single: sizes differ")
        return self._enter(
            "all_gather_single",
            [tensor],
            [gathered],
            lambda own, out: self._gloo._allgather_base(out[0], own[0], options),
            (tensor.numel(),),
        )

    def reduce_scatter_single(self, part: Tensor, tensor: Tensor, options: Any) -> dist.Work:
        if tensor.numel() != part.numel() * self.size():
            BROKEN.append("reduce_scatter_single: sizes differ")
        return self._enter(
            "reduce_scatter_single",
            [tensor],
            [part],
            lambda own, out: self._gloo._reduce_scatter_base(out[0], own[0], options),
            (_reduction("reduce_scatter_single", options), part.numel()),
        )

    def all_to_all_single(
        self,
        received: Tensor,
        sent: Tensor,
        recv_splits: list[int],
        send_splits: list[int],
        options: Any,
    ) -> dist.Work:
        row = sent.shape[1:].numel()
        if received.shape[1:].numel() != row:
            BROKEN.append("all_to_all_single: widths differ")
        size = self.size()
        sizes = {
            "sent": tuple(send_splits or [len(sent) // size] * size),
            "received": tuple(recv_splits or [len(received) // size] * size),
        }
        return self._enter(
            "all_to_all_single",
            [sent],
            [received],
            lambda own, out: self._gloo.alltoall_base(
                out[0], own[0], recv_splits, send_splits, options
            ),
            (row,),
            **sizes,
        )

    # Names of torch 2.11.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single
    alltoall_base: Any = all_to_all_single


def _create(options: Any, _: Any) -> RuleGroup:
    return RuleGroup(options)


def install() -> None:
    """Let this process join its job under these rules, before it does."""
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    join = dist.init_process_group

    @functools.wraps(join)
    def join_with_rules(_: str, *args: Any, **keywords: Any) -> None:
        join(BACKEND, *args, **keywords)

    dist.init_process_group = join_with_rules


@contextmanager
def no_objects() -> Iterator[None]:
    """Refuse collectives that move Python objects, or that NCCL lacks."""
    with ExitStack() as stack:
        for name in OBJECTS:

            def refuse(*_: Any, name: str = name, **__: Any) -> None:
                raise AssertionError(f"{name} in a step")

            stack.enter_context(mock.patch.object(dist, name, refuse))
        yield


def take() -> tuple[list[Entry], list[str], int]:
    """Return and forget what this rank has entered, broken and not finished."""
    taken = list(LOG), list(BROKEN), len(UNFINISHED)
    LOG.clear()
    BROKEN.clear()
    UNFINISHED.clear()
    return taken


def difference(logs: Sequence[Sequence[Entry]]) -> str | None:
    """Describe where two ranks disagree about the collectives of the groups that both are in.

    The order across groups counts as well: NCCL may deadlock where it differs.
    """
    for a in range(len(logs)):
        for b in range(a + 1, len(logs)):
            common = [[e for e in logs[r] if {a, b} <= set(e.group[0])] for r in (a, b)]
            if len(common[0]) != len(common[1]):
                return f"ranks {a} and {b} enter {len(common[0])} and {len(common[1])}"
            for number, (ours, theirs) in enumerate(zip(*common, strict=True)):
                if ours[:3] != theirs[:3]:
                    return f"collective {number}: rank {a} {ours}, rank {b} {theirs}"
                at_a, at_b = (ours.group[0].index(rank) for rank in (a, b))
                if ours.sent and (
                    ours.sent[at_b] != theirs.received[at_a]
                    or theirs.sent[at_a] != ours.received[at_b]
                ):
                    return f"collective {number}: sizes of {ours} and {theirs} do not match"
    return None
