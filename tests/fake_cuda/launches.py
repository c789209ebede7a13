"""Counts what a CUDA device would have to do, on tensors that have shapes and no memory.

Tensors of the meta device stand in for those of a GPU: autograd runs on them, an operation that
would make the host wait for a value raises, and everything that reaches the device passes here.
Our own operators run their CUDA implementations, whose Triton kernels are recorded in place of
being launched.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

import moa_dist
from moa_dist.kernels.hardware import Hardware
from tests.fake_cuda.gathers import GATHERS, UPDATED
from tests.fake_cuda.host_waits import place

PACKAGE = Path(moa_dist.__file__).parent
UNLAUNCHED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}
"""Operations that allocate or rename memory; views are recognized by their schema."""
FILLS = {"new_zeros", "zeros_like", "ones_like", "full_like", "new_ones", "new_full"}
"""Operations that do not read the tensor that they are called with."""
ADDS = {"index_add", "index_add_", "index_reduce", "scatter_add", "scatter_add_", "scatter_reduce"}
"""Operations that add to memory atomically, in its own type; so does `index_put` with a sum."""
NARROW = (torch.bfloat16, torch.float16)
COMPILER_OPTIONS = {"num_warps", "num_stages", "num_ctas"}
"""Arguments of a launch that are none of its kernel."""
H100 = Hardware("cuda", capability=(9, 0))


class Launches(TorchDispatchMode):
    """Records kernels, bytes, and copies from the host while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        """Kernels launched by operation, those of Triton by `triton:` and their name."""
        self.by_place: Counter[str] = Counter()
        """Kernels launched by file of the package; those of autograd's own nodes by `autograd`."""
        self.bytes_by_place: Counter[str] = Counter()
        """What `bytes_full` counts, by file."""
        self.bytes_full = 0
        """Bytes read and written, a gathered operand counted once per gathered row."""
        self.bytes_distinct = 0
        """Bytes read and written, a gathered operand counted once per distinct row."""
        self.waits: Counter[str] = Counter()
        """Copies from the host, by place."""
        self.fp64: Counter[str] = Counter()
        """Results in fp64, by place."""
        self.narrow_sums: Counter[str] = Counter()
        """Operations that add rows one by one in 16 bits, by place."""
        self.largest_mask = 0
        """Elements of the largest result of type bool."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "moa_dist":
            with self:  # so that what the operator does is recorded too
                return OPDEFS[op.name()]._backend_fns["cuda"](*args, **kwargs)
        result = op(*args, **kwargs)
        inputs, outputs = (
            [x for x in tree_leaves(part) if isinstance(x, Tensor)]
            for part in ((args, kwargs), result)
        )
        if any(x.is_meta for x in outputs):
            self._record(op, inputs, outputs)
        return result

    def _record(self, op: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = op._schema.name.split("::")[1]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        if is_view or name in UNLAUNCHED:
            return
        where = place()
        if any(not x.is_meta and x.dim() for x in inputs):
            self.waits[f"{name} at {where}"] += 1
        if name in ADDS and any(x.dtype in NARROW for x in outputs):
            self.narrow_sums[f"{name} at {where}"] += 1
        if any(x.dtype == torch.float64 for x in outputs):
            self.fp64[f"{name} at {where}"] += 1
        masks = (x.numel() for x in outputs if x.dtype == torch.bool)
        self.largest_mask = max([self.largest_mask, *masks])
        read = [] if name in FILLS else inputs
        if name == "index_select":
            read = [outputs[0], inputs[1]]
        moved = sum(x.nbytes for x in (*read, *outputs) if x.is_meta)
        self._count(name, where, moved, moved)

    def _count(self, name: str, place: str, full: int, distinct: int) -> None:
        self.kernels[name] += 1
        self.by_place[place.partition(":")[0]] += 1
        self.bytes_by_place[place.partition(":")[0]] += full
        self.bytes_full += full
        self.bytes_distinct += distinct

    def triton(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a launch of a Triton kernel, with the bytes of its arguments."""
        options = {key: value for key, value in kwargs.items() if key not in COMPILER_OPTIONS}
        operands = inspect.signature(kernel.fn).bind(*args, **options).arguments
        # An operand that is not used is another one, passed in its place.
        tensors = {_identity(x): x for x in operands.values() if isinstance(x, Tensor)}
        name = kernel.fn.__name__
        distinct = full = sum(x.nbytes for x in tensors.values())
        for read, written in UPDATED.get(name, ()):
            if operands[read] is operands[written]:
                distinct += operands[read].nbytes
                full += operands[read].nbytes
        for gather in GATHERS.get(name, ()):
            rows, index = operands[gather.rows], operands[gather.index]
            if rows is not None and index is not None and not index.is_floating_point():
                full += index.numel() * prod(rows.shape[1:]) * rows.element_size() - rows.nbytes
        assert distinct, f"the Triton kernel {name} is launched without a tensor"
        self._count(f"triton:{name}", place(), full, distinct)

    @property
    def num_kernels(self) -> int:
        """Number of kernels launched, Triton's included."""
        return self.kernels.total()


Recorded = TypeVar("Recorded", bound=Launches)


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the fused operator that torch chooses on a GPU: flash attention unless masked."""
    assert k.shape[1] == q.shape[1] or enable_gqa
    if attn_mask is None:
        width, pad = q.shape[-1], -q.shape[-1] % 8
        if pad:
            q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal)[0][..., :width]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, True, dropout_p, is_causal)[0]


def fused_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Stand in for torch's fused RMSNorm of GPUs, which takes the shapes of a LayerNorm's tensors.

    On the meta device torch composes it of a dozen operations.
    """
    return F.layer_norm(x, shape, weight, None, eps or 1e-6)


@contextmanager
def fake_cuda(
    hardware: Hardware = H100, record_of: type[Recorded] = Launches
) -> Iterator[Callable[[], Recorded]]:
    """Take the meta device for a GPU; yields what starts a new record and returns it."""
    current: list[Recorded] = []

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        assert all(grid), f"an empty grid for {kernel.fn.__name__}: {grid}"
        return lambda *args, **kwargs: current[-1].triton(kernel, args, kwargs)

    def record() -> Recorded:
        current.append(record_of())
        return current[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", launcher)
        patch.setattr(Hardware, "of", classmethod(lambda cls, device: hardware))
        patch.setattr(F, "scaled_dot_product_attention", fused_attention)
        patch.setattr(F, "rms_norm", fused_norm)
        yield record
