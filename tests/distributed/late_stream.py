"""A device whose reductions run as late as DeepSpeed's synchronization allows, on a CPU.

On a GPU, DeepSpeed reduces gradients on a stream of its own. Nothing says when that stream runs,
except that whoever waits for it finds its work done. `LateStream` queues all work until then.
Memory that its owner has freed in the meantime, without `record_stream`, belongs to whoever
allocates next: here it is overwritten with ones before the queued work reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Queued(NamedTuple):
    """An operation that has been launched, but not run."""

    function: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Tensor | None
    """Where the result goes; None if the operation writes to its arguments."""


class LateStream(TorchDispatchMode):
    """Queues operations, collectives included, until another stream waits for this one."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[_Queued] = []
        self._read: list[Tensor] = []
        """Aliases of all that queued work reads and this stream has not allocated."""
        self._own: set[int] = set()
        self._recorded: set[int] = set()
        self.poisoned = 0
        """How often memory was read after it had been freed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        schema = func._schema
        returns = [str(result.type) for result in schema.returns]
        if not returns or "Tensor" not in returns[0]:
            self.run()
            return func(*args, **kwargs)
        mutates = schema.is_mutable or func.namespace == "c10d"
        result = None if mutates else func(*args, **kwargs)
        if result is not None:
            assert isinstance(result, Tensor), func
            self._own.add(_storage(result))
            if result.is_floating_point():
                result.fill_(torch.nan)  # nobody may look at it yet
        alias = tree_map_only(Tensor, self._alias, (args, kwargs))
        self._queue.append(_Queued(func, *alias, None if result is None else result.detach()))
        if func.namespace == "c10d":
            return args[0], Work.boxed(FakeWork())
        return args[0] if result is None else result

    def _alias(self, tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        if _storage(alias) not in self._own:
            self._read.append(alias)
        return alias

    def record(self, tensor: Tensor) -> None:
        """Keep the tensor's memory until this stream has run, as `record_stream` does."""
        self._recorded.add(_storage(tensor))

    def run(self) -> None:
        """Overwrite memory that was freed, then run what is queued."""
        queue, read, recorded = self._queue, self._read, self._recorded
        self._queue, self._read, self._own, self._recorded = [], [], set(), set()
        for tensor in {_storage(tensor): tensor for tensor in read}.values():
            ours = sum(_storage(other) == _storage(tensor) for other in read)
            if _storage(tensor) not in recorded and _num_references(tensor) == ours:
                self.poisoned += 1
                torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(1)
        for function, args, keywords, result in queue:
            value = function(*args, **keywords)
            if function.namespace == "c10d":
                Work.unbox(value[1]).wait()
            elif result is not None:
                result.copy_(value)

    def wait_stream(self, _other: Any) -> None:
        """Do nothing: other streams are always up to date."""

    def wait_event(self, _event: Any) -> None:
        """Do nothing: other streams are always up to date."""

    def synchronize(self) -> None:
        """Run what is queued."""
        self.run()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _num_references(tensor: Tensor) -> int:
    """Count the tensors that share this one's memory; torch keeps one reference for Python."""
    return torch._C._storage_Use_Count(_storage(tensor)) - 1


class _PromptStream:
    """A stream whose work is done at once, such as the one that computes."""

    def wait_stream(self, other: Any) -> None:
        other.synchronize()

    def synchronize(self) -> None:
        """Do nothing: all is done."""


class _Event:
    """An event of a stream; whoever waits for it waits for all of that stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Any = None

    def record(self, stream: Any = None) -> None:
        self._stream = stream or get_accelerator().current_stream()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def query(self) -> bool:
        return True


class LateAccelerator(CPU_Accelerator):
    """DeepSpeed's accelerator of this device; `late` is the stream to reduce gradients on."""

    Stream = _PromptStream
    Event = _Event

    def __init__(self) -> None:
        super().__init__()
        self.late = LateStream()
        self.waits = 0
        """How often the host has waited for all streams."""
        self._current: list[Any] = [_PromptStream()]

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def current_stream(self, device_index: int | None = None) -> Any:
        return self._current[-1]

    def default_stream(self, device_index: int | None = None) -> Any:
        return self._current[0]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._current.append(stream)
        try:
            if isinstance(stream, LateStream):
                with stream:
                    yield
            else:
                yield
        finally:
            self._current.pop()

    def synchronize(self, device_index: int | None = None) -> None:
        self.waits += 1
        self.late.run()


@contextmanager
def late_accelerator() -> Iterator[LateAccelerator]:
    """Let DeepSpeed use a device whose reductions run late."""
    before, accelerator = get_accelerator(), LateAccelerator()
    set_accelerator(accelerator)

    def record_stream(tensor: Tensor, stream: Any) -> None:
        if isinstance(stream, LateStream):
            stream.record(tensor)

    try:
        with mock.patch.object(torch.Tensor, "record_stream", record_stream):
            yield accelerator
    finally:
        set_accelerator(before)


def reduce_late(engine: Any, accelerator: LateAccelerator) -> None:
    """Let a DeepSpeed engine reduce its gradients on the late stream."""
    optimizer = engine.optimizer
    for name in ("reduction_stream", "reduce_and_partition_stream"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, accelerator.late)
