"""Routed experts: gather rows, multiply each by its expert's matrices, add them up.

Several kernels with one result, chosen by device, type and widths; shapes as in `row_map`.
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
    """One way to compute routed experts, and why it is taken."""

    run: Callable[[ExpertWeights, Tensor, RowMap], Tensor]
    """As `routed_experts`."""
    because: str
    """Name and reason, to be printed."""


_IN_PARTS = Kernel(
    custom_op_experts,
    "in parts, because on a CPU rows should be used while they are in its cache",
)
_GROUPED = Kernel(
    grouped_experts,
    "torch's grouped product, because it is fastest for bf16 in these widths on this GPU",
)
_TILES = Kernel(
    custom_op_experts,
    "Triton, because torch's grouped product is slow or refuses in this type, these widths or on "
    "this GPU",
)
_LOOP = Kernel(
    grouped_experts,
    "a product per expert, because Triton is not installed, sums in a fixed order are asked for, "
    "or the type is fp64",
)


@annotated("experts")
def routed_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """`y[write[a]] += weight[a] * expert(x[read[a]])` over all assignments a: [X, D] -> [Y, O].

    Sums in fp32 or wider, returns the type of `x`. Differentiable in x, the weights and all
    matrices; an expert without rows gets a zero gradient. Deterministic on CPUs, and on GPUs where
    `torch.use_deterministic_algorithms` asks for it.
    """
    return kernel_for(experts, x).run(experts, x, row_map)


def kernel_for(experts: ExpertWeights, x: Tensor) -> Kernel:
    """The kernel that is taken for these experts and rows."""
    if x.device.type == "cpu":
        return _IN_PARTS
    if grouped_matmul_fits(x, *experts.tensors()) and _has_fast_grouped_product(x.device):
        return _GROUPED
    ordered = torch.are_deterministic_algorithms_enabled()
    if ordered or x.dtype == torch.float64 or not _HAS_TRITON:
        return _LOOP
    return _TILES


def _has_fast_grouped_product(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
