"""Reduces and clips gradients at ZeRO 0. W counts ranks.

There DeepSpeed averages the norms of the ranks, though each holds other experts, and rejects fp64.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moa_dist.distributed.mesh import Mesh
from moa_dist.distributed.traffic import TrafficKey


def reduce_and_clip(
    model: nn.Module, expert_names: Set[str], mesh: Mesh, clip_norm: float | None
) -> float:
    """Average gradients over ranks, clip them by their global norm, return that norm. Collective.

    An expert's gradient already sums over its ep group, by way of the all-to-all: sum over its
    copies, then divide by W like all others.
    """
    dense: list[Tensor] = []
    experts: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:  # the same on every rank: none depends on data
            (experts if name in expert_names else dense).append(parameter.grad)
    device = next(model.parameters()).device
    squares = [
        _average(dense, None, mesh, device),
        _average(experts, mesh.edp_group, mesh, device),
    ]
    with mesh.comm_timer.begin("norm of expert gradients"):
        dist.all_reduce(squares[1], group=mesh.ep_group)
    norm = (squares[0] + squares[1]).sqrt()
    if clip_norm is not None:
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in (*dense, *experts):
            gradient.mul_(factor)
    return float(norm)


def _average(
    gradients: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    mesh: Mesh,
    device: torch.device,
) -> Tensor:
    """Sum gradients over a group of experts' copies, or over all ranks, and divide by W.

    Returns the sum of their squares, fp64.
    """
    flat = torch.cat([g.flatten() for g in gradients] or [torch.zeros(0, device=device)])
    key = TrafficKey("experts" if group else "dense", "reduce", backward=True)
    with mesh.comm_timer.begin(key):
        dist.all_reduce(flat, group=group)
    num_ranks = dist.get_world_size(group)
    mesh.traffic_counter.add(key, 2 * (num_ranks - 1) * flat.nbytes // num_ranks)
    flat /= mesh.world_size
    parts = flat.split([g.numel() for g in gradients])
    for gradient, average in zip(gradients, parts, strict=True):
        gradient.copy_(average.view_as(gradient))
    return flat.double().square().sum()
