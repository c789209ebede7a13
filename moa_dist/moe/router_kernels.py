"""Triton kernels of a router: choose and weight experts, and sum up statistics.

One program handles some tokens of one router group and one group of sequences, with all of the
group's experts in registers. Sums over tokens are taken in a fixed order: each program writes its
own, and a second kernel adds them up.

Shapes: T tokens, G router groups, E experts per group, K chosen, N groups of sequences, P programs
per group of sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moa_dist.moe.fused_choice import LEAST_SUM, Chosen, Options, alloc_chosen

_TILE = 4096
"""Number of logits in one program, unless a single token has more."""


def tile(num_experts: int, tokens_per_group: int) -> tuple[int, int]:
    """Return the sizes of a program's tile: tokens, and experts padded to a power of two."""
    columns = triton.next_power_of_2(num_experts)
    rows = min(64, max(_TILE // columns, 1), triton.next_power_of_2(tokens_per_group))
    return rows, columns


def num_warps(rows: int, columns: int) -> int:
    """Return the number of warps that keep a tile in registers, 4 numbers per thread if it can."""
    return min(max(rows * columns // 128, 4), 16)


def choose(
    logits: Tensor,
    bias: Tensor | None,
    uniform: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    options: Options,
) -> Chosen:
    """Choose experts by `logits` [T, G * E] fp32; see `fused_choice.choose`."""
    K, G, N = options.top_k, options.num_groups, options.num_sequence_groups
    T, E = logits.shape[0], logits.shape[1] // G
    rows, columns = tile(E, T // N)
    num_programs = triton.cdiv(T // N, rows)
    partial = logits.new_empty(N, num_programs, G, 2 * E + 3)
    chosen = alloc_chosen(logits, options)
    _choose[(num_programs, G, N)](
        logits,
        logits if bias is None else bias,
        logits if uniform is None else uniform,
        logits if token_mask is None else token_mask,
        chosen.ids if given is None else given.contiguous(),
        chosen.ids,
        chosen.weights,
        chosen.log_sum,
        partial,
        T // N,
        E,
        options.dropout,
        BIAS=bias is not None,
        DROPOUT=uniform is not None,
        MASK=token_mask is not None,
        GIVEN=given is not None,
        SOFTMAX=options.score == "softmax",
        RENORMALIZE=options.gate != "raw",
        K=K,
        SLOTS=triton.next_power_of_2(K),
        LEAST_SUM=LEAST_SUM,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps(rows, columns),
    )
    block = min(128, columns)
    _sum_up[(triton.cdiv(E, block), G, N)](
        partial,
        *chosen[3:],
        num_programs,
        E,
        ROWS=min(32, triton.next_power_of_2(num_programs)),
        COLUMNS=block,
    )
    return chosen


@triton.jit
def find_logits(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    tokens_per_group, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return a program's tokens and experts, which of them exist, and where its logits are.

    `pair` is the place of a token's values for this router group.
    """
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = within < tokens_per_group
    token = tl.program_id(2).to(tl.int64) * tokens_per_group + within
    pair = token * tl.num_programs(1) + tl.program_id(1)
    expert = tl.arange(0, COLUMNS)
    is_expert = expert < num_experts
    place = pair[:, None] * num_experts + expert[None, :]
    return token, is_token, pair, expert, is_expert, place, is_token[:, None] & is_expert[None, :]


@triton.jit
def is_counted(token_mask, token, is_token, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which tokens count in statistics: those that exist and are no padding."""
    counted = is_token
    if MASK:
        counted = counted & (tl.load(token_mask + token, mask=is_token, other=0) != 0)
    return counted


@triton.jit(do_not_specialize=["tokens_per_group"])
def _choose(  # type: ignore[no-untyped-def]
    logits,
    bias,
    uniform,
    token_mask,
    given,
    ids,
    weights,
    log_sums,
    partial,
    tokens_per_group,
    num_experts,
    dropout,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    GIVEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAST_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    token, is_token, pair, expert, is_expert, place, mask = find_logits(
        tokens_per_group, num_experts, ROWS, COLUMNS
    )
    logit = tl.load(logits + place, mask=mask, other=0.0)
    highest = tl.max(tl.where(is_expert[None, :], logit, -float("inf")), axis=1)
    exponential = tl.where(is_expert[None, :], tl.exp(logit - highest[:, None]), 0.0)
    total = tl.sum(exponential, axis=1)
    log_sum = highest + tl.log(total)
    probability = exponential / total[:, None]
    tl.store(log_sums + pair, log_sum, mask=is_token)

    score = probability
    if not SOFTMAX:
        score = 1.0 / (1.0 + tl.exp(-logit))
    key = score
    if BIAS:
        values = tl.load(bias + group * num_experts + expert, mask=is_expert, other=0.0)
        key = key + values[None, :]
    if DROPOUT:
        drawn = tl.load(uniform + place, mask=mask, other=1.0)
        # Hidden, but still before what has been chosen already: K experts are distinct.
        key = tl.where(drawn < dropout, -1e38, key)
    key = tl.where(is_expert[None, :], key, -float("inf"))
    taken = tl.zeros((ROWS, COLUMNS), tl.int32)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((ROWS, SLOTS), tl.float32)
    chosen_ids = tl.zeros((ROWS, SLOTS), tl.int32)
    for k in range(K):
        if GIVEN:
            flat = tl.load(given + pair * K + k, mask=is_token, other=0)
            best = (flat - group * num_experts).to(tl.int32)
        else:
            # NaN compares with nothing, and must not become an expert that does not exist.
            best = tl.minimum(tl.argmax(key, axis=1), num_experts - 1)
        here = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(here, score, 0.0), axis=1)
        chosen = tl.where(slot[None, :] == k, value[:, None], chosen)
        chosen_ids = tl.where(slot[None, :] == k, best[:, None], chosen_ids)
        taken += here.to(tl.int32)
        key = tl.where(here, -float("inf"), key)
    if RENORMALIZE:
        chosen = chosen / tl.maximum(tl.sum(chosen, axis=1), LEAST_SUM)[:, None]
    place = pair[:, None] * K + slot[None, :]
    mask = is_token[:, None] & (slot < K)[None, :]
    tl.store(weights + place, chosen, mask=mask)
    tl.store(ids + place, (group * num_experts + chosen_ids).to(tl.int64), mask=mask)

    counted = is_counted(token_mask, token, is_token, MASK)
    mean_logit = tl.sum(probability * logit, axis=1)
    base = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * num_groups + group
    sums = partial + base.to(tl.int64) * (2 * num_experts + 3)
    column = tl.sum(tl.where(counted[:, None], probability, 0.0), axis=0)
    tl.store(sums + expert, column, mask=is_expert)
    column = tl.sum(tl.where(counted[:, None], taken, 0), axis=0).to(tl.float32)
    tl.store(sums + num_experts + expert, column, mask=is_expert)
    last = sums + 2 * num_experts
    tl.store(last, tl.sum(tl.where(counted, log_sum * log_sum, 0.0), axis=0))
    tl.store(last + 1, tl.sum(tl.where(counted, log_sum - mean_logit, 0.0), axis=0))
    tl.store(last + 2, tl.sum(counted.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["num_programs"])
def _sum_up(  # type: ignore[no-untyped-def]
    partial,
    probability,
    z,
    entropy,
    load,
    num_tokens,
    dropped,
    num_programs,
    num_experts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    sequence_group = tl.program_id(2)
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_expert = expert < num_experts
    width = 2 * num_experts + 3
    of_probability = tl.zeros((COLUMNS,), tl.float32)
    of_load = tl.zeros((COLUMNS,), tl.float32)
    of_z = tl.zeros((ROWS,), tl.float32)
    of_entropy = tl.zeros((ROWS,), tl.float32)
    of_tokens = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_programs, ROWS):
        program = start + tl.arange(0, ROWS)
        is_program = program < num_programs
        row = ((sequence_group * num_programs + program) * num_groups + group).to(tl.int64)
        sums = partial + row * width
        mask = is_program[:, None] & is_expert[None, :]
        columns = sums[:, None] + expert[None, :]
        of_probability += tl.sum(tl.load(columns, mask=mask, other=0.0), axis=0)
        of_load += tl.sum(tl.load(columns + num_experts, mask=mask, other=0.0), axis=0)
        last = sums + 2 * num_experts
        of_z += tl.load(last, mask=is_program, other=0.0)
        of_entropy += tl.load(last + 1, mask=is_program, other=0.0)
        of_tokens += tl.load(last + 2, mask=is_program, other=0.0)
    pair = sequence_group * num_groups + group
    place = pair * num_experts + expert
    tl.store(probability + place, of_probability, mask=is_expert)
    # Counts are exact in fp32 up to 2^24 tokens of one group of sequences.
    tl.store(load + place, of_load.to(tl.int64), mask=is_expert)
    tl.store(dropped + place, tl.zeros((COLUMNS,), tl.int64), mask=is_expert)
    if tl.program_id(0) == 0:
        tl.store(z + pair, tl.sum(of_z, axis=0))
        tl.store(entropy + pair, tl.sum(of_entropy, axis=0))
        if group == 0:
            tl.store(num_tokens + sequence_group, tl.sum(of_tokens, axis=0).to(tl.int64))
