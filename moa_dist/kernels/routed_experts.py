"""Routed experts: gather rows, multiply each by its expert's matrices, add them up.

Several kernels compute the same result; device, type and widths decide which one runs. Shapes as in
`row_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.custom_op import custom_op_experts
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.kernels.grouped_matmul import grouped_matmul_fits
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.kernels.triton_support import triton_problem
from moa_dist.profiling import annotated

RoutedExperts = Callable[[ExpertWeights, Tensor, RowMap], Tensor]
"""A function with the signature and the meaning of `routed_experts`."""

_HAS_TRITON = triton_problem() is None  # now, since torch.compile would trace the question


class Kernel(NamedTuple):
    """A way to compute routed experts, and when it is the right one."""

    run: RoutedExperts
    because: str
    """Its name and the reason for choosing it, as shown to a user."""


class Hardware(NamedTuple):
    """What the choice of a kernel depends on; it need not be that of this machine."""

    device_type: str
    """As in `torch.device.type`."""
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device."""
    has_triton: bool = True
    """Triton is installed there, and finds a C compiler."""
    deterministic: bool = False
    """Sums must be taken in a fixed order."""

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """Describe a device of this machine, under torch's present settings."""
        return cls(
            device_type=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            has_triton=_HAS_TRITON,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


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
    "one matmul per expert, because Triton cannot be used, deterministic sums are required, or "
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


def kernel_for(experts: ExpertWeights, x: Tensor, hardware: Hardware | None = None) -> Kernel:
    """Choose the kernel for these experts and rows, by default on the device of the rows."""
    hardware = hardware or Hardware.of(x.device)
    if hardware.device_type == "cpu":
        return _CPU_BLOCKED
    has_fast_grouped_product = hardware.device_type != "cuda" or hardware.capability == (9, 0)
    if grouped_matmul_fits(x, *experts.tensors()) and has_fast_grouped_product:
        return _GROUPED
    if hardware.deterministic or x.dtype == torch.float64 or not hardware.has_triton:
        return _LOOP
    return _TRITON
