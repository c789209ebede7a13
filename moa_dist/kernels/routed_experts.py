"""Routed experts: gather rows, multiply each by its expert's matrices, add them up.

Several kernels compute the same result; device, type and widths decide which one runs. Shapes as in
`row_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.custom_op import custom_op_experts
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.kernels.grouped_matmul import grouped_matmul_fits
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.profiling import annotated

_HAS_TRITON = find_spec("triton") is not None


class Kernel(NamedTuple):
    """A way to compute routed experts, and when it is the right one."""

    run: Callable[[ExpertWeights, Tensor, RowMap], Tensor]
    """Has the signature and the meaning of `routed_experts`."""
    because: str
    """Its name and the reason for choosing it, as shown to a user."""


_CPU_BLOCKED = Kernel(
    custom_op_experts,
    "blocked CPU kernel, because it uses gathered rows while they are still in the cache",
)
_GROUPED = Kernel(
    grouped_experts,
    "torch grouped_mm, because it is fastest for bf16 with these widths on this GPU",
)
_TRITON = Kernel(
    custom_op_experts,
    "Triton, because torch grouped_mm is slow or unsupported for this type, these widths or this "
    "GPU",
)
_LOOP = Kernel(
    grouped_experts,
    "one matmul per expert, because Triton is not installed, deterministic sums are required, or "
    "the type is fp64",
)


@annotated("experts")
def routed_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `y[write[a]] += weight[a] * expert(x[read[a]])` over all assignments a.

    Takes x [X, D] and returns y [Y, O] in the type of x; sums are fp32 or wider. Differentiable in
    x, the weights and all matrices; an expert without rows gets a zero gradient. Deterministic on
    CPUs, and on GPUs under `torch.use_deterministic_algorithms`.
    """
    return kernel_for(experts, x).run(experts, x, row_map)


def kernel_for(experts: ExpertWeights, x: Tensor) -> Kernel:
    """Return the kernel that `routed_experts` runs for these experts and rows."""
    if x.device.type == "cpu":
        return _CPU_BLOCKED
    if grouped_matmul_fits(x, *experts.tensors()) and _has_fast_grouped_product(x.device):
        return _GROUPED
    ordered = torch.are_deterministic_algorithms_enabled()
    if ordered or x.dtype == torch.float64 or not _HAS_TRITON:
        return _LOOP
    return _TRITON


def _has_fast_grouped_product(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
