"""Triton kernels that sort assignments by expert, by counting.

Programs count the experts of their own assignments, one cumulative sum over these counts says
where each program's assignments of each expert begin, and a second kernel puts them there. The
order of tokens within an expert is kept, and nothing depends on which program runs first.

Shapes: A assignments, E experts, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_dist.moe.expert_sort import Sorted, alloc_sorted

_ASSIGNMENTS, _EXPERTS = 128, 128
"""Assignments, and experts at a time, of one program."""


def sort_by_expert(expert: Tensor, num_experts: int, divisors: list[int]) -> Sorted:
    """Sort assignments [A] int64 by `expert`; see `expert_sort.sort_by_expert`."""
    A = len(expert)
    num_programs = max(triton.cdiv(A, _ASSIGNMENTS), 1)
    rank = expert.new_empty(A, dtype=torch.int32)
    # One expert more than there are: that of assignments without an expert.
    counts = expert.new_empty((num_experts + 1) * num_programs, dtype=torch.int32)
    _rank[(num_programs,)](
        expert,
        rank,
        counts,
        A,
        num_experts,
        num_programs,
        BLOCK=_ASSIGNMENTS,
        EXPERTS=min(_EXPERTS, triton.next_power_of_2(num_experts + 1)),
        num_warps=8,
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    result = alloc_sorted(expert, num_experts, divisors)
    quotients = [*result.quotients, result.order, result.order]  # those after the last are unused
    sizes = [*divisors, 1, 1]
    _place[(max(num_programs, triton.cdiv(num_experts, _ASSIGNMENTS)),)](
        expert,
        rank,
        counts,
        ends,
        result.counts,
        result.order,
        result.place,
        *quotients[:2],
        A,
        num_experts,
        num_programs,
        *sizes[:2],
        QUOTIENTS=len(divisors),
        BLOCK=_ASSIGNMENTS,
    )
    return result


@triton.jit(do_not_specialize=["num_assignments", "num_experts", "num_programs"])
def _rank(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    expert,
    rank,
    counts,
    num_assignments,
    num_experts,
    num_programs,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    within = tl.arange(0, BLOCK)
    a = tl.program_id(0) * BLOCK + within
    exists = a < num_assignments
    of = tl.load(expert + a, mask=exists, other=-1).to(tl.int32)
    # The same once more, along the other axis: each is compared with each.
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.load(expert + b, mask=b < num_assignments, other=-1).to(tl.int32)
    is_before = (of[:, None] == other[None, :]) & (b[None, :] < a[:, None])
    tl.store(rank + a, tl.sum(is_before.to(tl.int32), axis=1), mask=exists)
    for start in range(0, num_experts + 1, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        occurrences = tl.sum((of[:, None] == e[None, :]).to(tl.int32), axis=0)
        place = e.to(tl.int64) * num_programs + tl.program_id(0)
        tl.store(counts + place, occurrences, mask=e <= num_experts)


@triton.jit(do_not_specialize=["num_assignments", "num_experts", "num_programs"])
def _place(  # type: ignore[no-untyped-def]
    expert,
    rank,
    counts,
    ends,
    sorted_counts,
    order,
    places,
    first_quotient,
    second_quotient,
    num_assignments,
    num_experts,
    num_programs,
    first_divisor,
    second_divisor,
    QUOTIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    a = program * BLOCK + tl.arange(0, BLOCK)
    exists = a < num_assignments
    block = tl.load(expert + a, mask=exists, other=0) * num_programs + program
    start = tl.load(ends + block, mask=exists, other=0)
    start -= tl.load(counts + block, mask=exists, other=0)
    place = start + tl.load(rank + a, mask=exists, other=0)
    tl.store(places + a, place.to(tl.int64), mask=exists)
    tl.store(order + place, a.to(tl.int64), mask=exists)
    if QUOTIENTS > 0:
        tl.store(first_quotient + place, (a // first_divisor).to(tl.int64), mask=exists)
    if QUOTIENTS > 1:
        tl.store(second_quotient + place, (a // second_divisor).to(tl.int64), mask=exists)
    # The number of rows of some experts: where the next begins, less where it begins itself.
    e = (program * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_expert = e < num_experts
    end = tl.load(ends + (e + 1) * num_programs - 1, mask=is_expert, other=0)
    first = tl.load(ends + e * num_programs - 1, mask=is_expert & (e > 0), other=0)
    tl.store(sorted_counts + e, (end - first).to(tl.int64), mask=is_expert)
