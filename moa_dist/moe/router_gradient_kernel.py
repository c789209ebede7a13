"""The Triton kernel of a router's gradient: that of the logits, from those of weights and sums.

It has the programs of the kernel that chooses, each with the same tokens and experts.

Shapes: T tokens, G router groups, E experts per group, K chosen, N groups of sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_dist.moe.fused_choice import LEAST_SUM, Options, StatisticsGradients
from moa_dist.moe.router_kernels import find_logits, is_counted, num_warps, tile


def choose_backward(
    grad_weights: Tensor | None,
    grad_statistics: StatisticsGradients,
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    log_sum: Tensor,
    token_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """Return the gradient of the logits, given those of weights [T, G, K] and statistics."""
    K, G, N = options.top_k, options.num_groups, options.num_sequence_groups
    T, E = logits.shape[0], logits.shape[1] // G
    rows, columns = tile(E, T // N)
    grad_logits = torch.empty_like(logits)
    grads = [None if x is None else x.contiguous() for x in (grad_weights, *grad_statistics)]
    _choose_backward[(triton.cdiv(T // N, rows), G, N)](
        *(logits if grad is None else grad for grad in grads),
        logits,
        ids,
        weights,
        log_sum,
        logits if token_mask is None else token_mask,
        grad_logits,
        T // N,
        E,
        GRAD_WEIGHTS=grads[0] is not None,
        GRAD_PROBABILITY=grads[1] is not None,
        GRAD_Z=grads[2] is not None,
        GRAD_ENTROPY=grads[3] is not None,
        MASK=token_mask is not None,
        SOFTMAX=options.score == "softmax",
        RENORMALIZE=options.gate != "raw",
        DETACHED=options.gate == "renormalized_detached",
        K=K,
        SLOTS=triton.next_power_of_2(K),
        LEAST_SUM=LEAST_SUM,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps(rows, columns),
    )
    return grad_logits


@triton.jit(do_not_specialize=["tokens_per_group"])
def _choose_backward(  # type: ignore[no-untyped-def]
    grad_weights,
    grad_probability,
    grad_z,
    grad_entropy,
    logits,
    ids,
    weights,
    log_sums,
    token_mask,
    grad_logits,
    tokens_per_group,
    num_experts,
    GRAD_WEIGHTS: tl.constexpr,
    GRAD_PROBABILITY: tl.constexpr,
    GRAD_Z: tl.constexpr,
    GRAD_ENTROPY: tl.constexpr,
    MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    DETACHED: tl.constexpr,
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
    log_sum = tl.load(log_sums + pair, mask=is_token, other=0.0)
    probability = tl.where(is_expert[None, :], tl.exp(logit - log_sum[:, None]), 0.0)

    counted = is_counted(token_mask, token, is_token, MASK)
    # The slope of the statistics; `of_probability` is the gradient of each probability.
    of_probability = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.program_id(2) * num_groups + group
    if GRAD_PROBABILITY:
        columns = grad_probability + sums * num_experts + expert
        of_sum = tl.load(columns, mask=is_expert, other=0.0)
        of_probability += tl.where(counted[:, None], of_sum[None, :], 0.0)
    if GRAD_Z:
        of_z = 2.0 * tl.load(grad_z + sums)
        grad += tl.where(counted, of_z * log_sum, 0.0)[:, None] * probability
    if GRAD_ENTROPY:
        of_entropy = tl.load(grad_entropy + sums)
        deviation = logit - tl.sum(probability * logit, axis=1)[:, None]
        grad -= tl.where(counted, of_entropy, 0.0)[:, None] * probability * deviation
    if GRAD_WEIGHTS:
        score = probability
        if not SOFTMAX:
            score = 1.0 / (1.0 + tl.exp(-logit))
        slot = tl.arange(0, SLOTS)
        chosen = pair[:, None] * K + slot[None, :]
        is_slot = is_token[:, None] & (slot < K)[None, :]
        scale = tl.full((ROWS,), 1.0, tl.float32)
        shift = tl.zeros((ROWS,), tl.float32)
        if RENORMALIZE:
            sum_chosen = tl.zeros((ROWS,), tl.float32)
            for k in range(K):
                best = tl.load(ids + pair * K + k, mask=is_token, other=0) - group * num_experts
                here = expert[None, :] == best[:, None]
                sum_chosen += tl.sum(tl.where(here, score, 0.0), axis=1)
            scale = 1.0 / tl.maximum(sum_chosen, LEAST_SUM)
            if not DETACHED:
                products = tl.load(grad_weights + chosen, mask=is_slot, other=0.0)
                products *= tl.load(weights + chosen, mask=is_slot, other=0.0)
                shift = tl.where(sum_chosen >= LEAST_SUM, tl.sum(products, axis=1), 0.0)
        of_score = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(K):
            best = tl.load(ids + pair * K + k, mask=is_token, other=0) - group * num_experts
            slope = tl.load(grad_weights + pair * K + k, mask=is_token, other=0.0)
            here = expert[None, :] == best[:, None]
            of_score += tl.where(here, ((slope - shift) * scale)[:, None], 0.0)
        if SOFTMAX:
            of_probability += of_score
        else:
            grad += of_score * score * (1.0 - score)
    mean = tl.sum(probability * of_probability, axis=1)
    grad += probability * (of_probability - mean[:, None])
    tl.store(grad_logits + place, grad, mask=mask)
