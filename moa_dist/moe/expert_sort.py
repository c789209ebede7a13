"""Sorts assignments by expert: which of them each expert takes, in which order.

Shapes: A assignments, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.hardware import Hardware
from moa_dist.moe.statistics import occurrences


class Sorted(NamedTuple):
    """Assignments by expert, those of one expert in their own order, those without one last."""

    counts: Tensor
    """[E] int64 assignments per expert."""
    order: Tensor
    """[A] int64, the assignment at each place."""
    place: Tensor
    """[A] int64, the place of each assignment: the inverse of `order`."""
    quotients: list[Tensor]
    """[A] int64 each, `order` divided by each of the divisors: rows, if each has equally many."""


def sort_by_expert(expert: Tensor, num_experts: int, divisors: list[int]) -> Sorted:
    """Sort assignments by `expert` [A] int64; the id `num_experts` marks one without an expert.

    At most two `divisors`. Never reads a value on the host, so it never waits for an accelerator.
    """
    if Hardware.of(expert.device).runs_triton:
        counts, order, place, quotients = _sort(expert, num_experts, divisors)
        return Sorted(counts, order, place, list(quotients))
    order = expert.argsort(stable=True)
    numbers = torch.arange(len(order), device=order.device)
    return Sorted(
        counts=occurrences(expert, num_experts + 1)[:num_experts],
        order=order,
        place=torch.empty_like(order).scatter_(0, order, numbers),
        quotients=[order // divisor for divisor in divisors],
    )


def alloc_sorted(expert: Tensor, num_experts: int, divisors: list[int]) -> Sorted:
    """Allocate, without initializing it, the result of `sort_by_expert`."""
    order, place, *quotients = (torch.empty_like(expert) for _ in range(2 + len(divisors)))
    return Sorted(expert.new_empty(num_experts), order, place, quotients)


def _run(*operands: Any) -> tuple[Any, ...]:
    from moa_dist.moe import sort_kernels

    return sort_kernels.sort_by_expert(*operands)


_sort = torch.library.custom_op(
    "moa_dist::sort_by_expert",
    _run,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor expert, int num_experts, int[] divisors) -> (Tensor, Tensor, Tensor, Tensor[])",
)
_sort.register_fake(lambda *operands: tuple(alloc_sorted(*operands)))
