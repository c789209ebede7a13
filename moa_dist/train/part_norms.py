"""Gradient norm and relative update of each part of a model.

They are measured around the step of torch's optimizer, where gradients, weights and updates lie in
the same tensors at every ZeRO stage. Every rank adds up squares of what it alone owns, on the
device; the sum over ranks is part of the collective that makes a report, so measuring adds neither
a collective nor a host-device synchronization. P is the number of parts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from moa_dist.models.parameter_parts import Part
from moa_dist.observe.metrics import PartNorms
from moa_dist.train.engine_state import OwnedRange

_ROOM = 3
"""Free memory needed for a copy of weights, as a multiple of it: the optimizer needs some, too."""
_GRADIENT, _UPDATE, _WEIGHT, _EXISTS = range(4)


@contextmanager
def measured_parts(
    optimizer: torch.optim.Optimizer,
    ranges: Iterable[OwnedRange],
    parts: Mapping[str, Part],
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield sums of squares [P, 4], filled in by the optimizer's step while open.

    Columns are gradients as the optimizer gets them, updates, weights before the update, and
    whether this rank owns any of the part. Updates are NaN where memory has no room for a copy of
    the weights. `parts` is the part of each parameter.
    """
    of_flat: dict[Tensor, dict[Part, list[OwnedRange]]] = {}
    for owned in ranges:
        by_part = of_flat.setdefault(owned.flat, defaultdict(list))
        by_part[parts[owned.parameter]].append(owned)
    squares = torch.zeros(len(Part), 4, dtype=torch.float64, device=device)
    before: dict[Tensor, Tensor | None] = {}

    def add(column: int, flat: Tensor, values: Tensor) -> None:
        for i, part in enumerate(Part):
            if views := [owned.of(values) for owned in of_flat[flat].get(part, [])]:
                squares[i, column] += get_total_norm(views).double().square()

    @torch.no_grad()
    def look_before(stepping: torch.optim.Optimizer, *_: Any) -> None:
        if before:  # an optimizer that calls the one it is derived from
            return
        flats = [p for group in stepping.param_groups for p in group["params"] if p in of_flat]
        has_room = _has_room(flats)
        for flat in flats:
            add(_WEIGHT, flat, flat.detach())
            if flat.grad is not None:
                add(_GRADIENT, flat, flat.grad)
            before[flat] = flat.detach().clone() if has_room else None

    @torch.no_grad()
    def look_after(*_: Any) -> None:
        for flat, old in before.items():
            if old is None:
                squares[:, _UPDATE] = math.nan
            else:
                add(_UPDATE, flat, old.sub_(flat.detach()))
        before.clear()

    hooks = [
        optimizer.register_step_pre_hook(look_before),
        optimizer.register_step_post_hook(look_after),
    ]
    for i, part in enumerate(Part):
        squares[i, _EXISTS] = float(any(part in by_part for by_part in of_flat.values()))
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _has_room(flats: list[Tensor]) -> bool:
    """Whether the device can hold a copy of these tensors and whatever their update takes."""
    if not flats or flats[0].device.type != "cuda":
        return True
    device = flats[0].device
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused >= _ROOM * sum(flat.nbytes for flat in flats)


def part_norms(squares: Tensor | None, grad_norm: float) -> dict[str, PartNorms]:
    """Return the norms of each part of the model from sums over ranks; empty if there are none.

    Clipping multiplies all gradients by one factor, which is undone here: the parts add up to
    `grad_norm`, the global norm before clipping.
    """
    if squares is None:
        return {}
    total = float(squares[:, _GRADIENT].sum())
    scale = grad_norm / math.sqrt(total) if total > 0 else 0.0
    return {
        part.value: PartNorms(
            scale * math.sqrt(gradient), math.sqrt(update / weight) if weight else math.nan
        )
        for part, (gradient, update, weight, exists) in zip(Part, squares.tolist(), strict=True)
        if exists
    }
