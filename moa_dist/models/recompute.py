"""Activation checkpointing of a block that keeps its choices of experts.

Choices must not change between the two passes, nor which assignments are dropped, and kernels
need not repeat a sum bit for bit. torch's selective checkpointing could keep them too, but it
demands that both passes run the very same operations: under ZeRO 3 they do not, as the gathers of
parameters, which run inside the block, depend on what was gathered before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


def _chooses(op: Any, args: tuple[Any, ...]) -> bool:
    """Return whether `op` orders scores: which experts are chosen, which assignments are dropped.

    Sorting integers, assignments by their expert, only repeats what these have decided.
    """
    choices = (torch.ops.aten.topk.default, torch.ops.aten.sort.stable)
    return op in choices and bool(args[0].is_floating_point())


class KeepChoices(TorchDispatchMode):
    """Passes the results of choices, which are not made again, to `keep`."""

    def __init__(self, keep: Callable[[tuple[Tensor, ...]], None]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if _chooses(op, args):
            self._keep(tuple(part.detach() for part in result))
        return result


class _Repeat(TorchDispatchMode):
    """Returns the results of the list in place of choosing again."""

    def __init__(self, kept: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._kept = kept
        self._next = 0

    def __enter__(self) -> Self:
        self._next = 0  # a graph may be gone through backwards several times
        super().__enter__()
        return self

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _chooses(op, args):
            return op(*args, **(kwargs or {}))
        result = self._kept[self._next]
        self._next += 1
        return tuple(part.detach() for part in result)


def _contexts() -> tuple[KeepChoices, _Repeat]:
    kept: list[tuple[Tensor, ...]] = []
    return KeepChoices(kept.append), _Repeat(kept)


def recomputed(function: Callable[..., Output], *args: Any) -> Output:
    """Call `function(*args)`, but recompute its activations in the backward pass."""
    # Non-reentrant: with shared layers the other kind fires gradient hooks per repeat.
    result: Output = checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)
    return result
