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
from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.profiling import annotated

RoutedExperts = Callable[[ExpertWeights, Tensor, RowMap], Tensor]
"""A function with the signature and the meaning of `routed_experts`."""


class Kernel(NamedTuple):
    """A way to compute routed experts, and when it is the right one."""

    run: RoutedExperts
    because: str
    """Its name and the reason for choosing it, as shown to a user."""


_CPU_BLOCKED = Kernel(
    custom_op_experts,
    "blocked CPU kernel, because it uses gathered rows while they are still in the cache",
)
_TRITON = Kernel(
    custom_op_experts,
    "Triton, because it gathers rows inside the products and writes each result once",
)
_GROUPED = Kernel(
    grouped_experts,
    "torch matmul per expert or grouped, because Triton cannot be used or the type is fp64",
)


@annotated("experts")
def routed_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `y[write[a]] += weight[a] * expert(x[read[a]])` over all assignments a.

    Takes x [X, D] and returns y [Y, O] in the type of x; sums are fp32 or wider. Differentiable in
    x, the weights and all matrices; an expert without rows gets a zero gradient. Deterministic.
    """
    return kernel_for(experts, x).run(experts, x, row_map)


def recomputed_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `routed_experts`, whose fused kernels then keep nothing but their operands."""
    return routed_experts(experts, x, row_map._replace(recompute=True))


def kernel_for(experts: ExpertWeights, x: Tensor, hardware: Hardware | None = None) -> Kernel:
    """Choose the kernel for these experts and rows, by default on the device of the rows."""
    hardware = hardware or Hardware.of(x.device)
    if hardware.device_type == "cpu":
        return _CPU_BLOCKED
    if hardware.runs_triton and x.dtype != torch.float64:
        return _TRITON
    return _GROUPED
