"""Routed experts: gather rows, multiply each by its expert's matrices, add them up.

Several kernels with one result, chosen by device; shapes as in `trip`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.kernels.at_once import routed_at_once
from moa_dist.kernels.in_parts import routed_in_parts
from moa_dist.kernels.trip import Experts, Trip


def routed_experts(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`y[write[a]] += weight[a] * expert(x[read[a]])` over all assignments a: [X, D] -> [Y, O].

    Sums in fp32 or wider, returns the type of `x`. Differentiable in x, the weights and all
    matrices; an expert without rows gets a zero gradient. Deterministic on CPUs.
    """
    if x.device.type == "cpu":
        return routed_in_parts(experts, x, trip)
    return routed_at_once(experts, x, trip)


def because(device: torch.device) -> str:
    """Which kernel `routed_experts` takes on `device`, and why."""
    if device.type == "cpu":
        return "in parts, because on a CPU rows should be used while they are in its cache"
    return "at once, because an accelerator wants all rows in one grouped matrix product"
