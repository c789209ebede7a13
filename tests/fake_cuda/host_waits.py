"""Counts operations on CPU tensors that would make the host wait for a GPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moa_dist

PACKAGE = Path(moa_dist.__file__).parent
ON_CPU_ONLY = {"kernels/cpu_blocked.py"}
"""Files that no GPU runs, and which may look at values."""
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result depends on values that the host must know."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def place() -> str:
    """Return the innermost line of the package that is running; `autograd` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.name != "profiling.py":
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name.split("::")[1]
        by_mask = name in INDEXING and any(
            x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor)
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            self.waits[f"{name} at {place()}"] += 1
        return op(*args, **kwargs)


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Yield a counter of waits, by operation and place, that fills while this is entered."""
    waits: Counter[str] = Counter()
    tolist, tensor = Tensor.tolist, torch.tensor

    def count(name: str) -> None:
        at = place()
        if at.partition(":")[0] not in ON_CPU_ONLY:
            waits[f"{name} at {at}"] += 1

    def counted_tolist(self: Tensor) -> Any:
        count("tolist")
        return tolist(self)

    def counted_tensor(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None:
            count("a copy from the host")
        return tensor(*args, **kwargs)

    # Replaced, as modes do not see what a recomputation calls within the backward pass.
    with (
        mock.patch.object(Tensor, "tolist", counted_tolist),
        mock.patch.object(torch, "tensor", counted_tensor),
        _Operations(waits),
    ):
        yield waits
