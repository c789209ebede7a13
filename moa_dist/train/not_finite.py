"""Losses and gradients that are not finite: where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.distributed.mesh import Mesh
from moa_dist.errors import BadStepError, BadStepReason
from moa_dist.models.objective import Batch, objective


def first_not_finite(model: Any, batches: Sequence[Batch], mesh: Mesh) -> str:
    """Name the first module, and its rank, whose output is not finite. Collective.

    `model` is DeepSpeed's engine, which runs the wrapped model; `batches` are this rank's.
    """
    found: list[str] = []

    def check(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        if not found and not all(bool(t.isfinite().all()) for t in floats):
            found.append(name or "the model's output")

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: check(name, output))
        for name, module in model.module.named_modules()
    ]
    with torch.no_grad():
        for batch in batches:
            objective(model, batch)
    for handle in handles:
        handle.remove()
    everywhere: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(everywhere, found[0] if found else None)
    named = [f"{name} on rank {rank}" for rank, name in enumerate(everywhere) if name]
    return "; ".join(named) or "the loss itself"


def require_finite(grad_norm: float) -> float:
    """Return the norm, equal on every rank; raises BadStepError if it is not finite."""
    if not math.isfinite(grad_norm):
        raise BadStepError(
            f"the loss is finite, but the gradient norm is {grad_norm}: lower optimizer.lr or the "
            "auxiliary coefficients, warm up for longer, or train in fp32 to see where it starts",
            BadStepReason.GRAD_NORM,
            {"grad_norm": grad_norm},
        )
    return grad_norm
