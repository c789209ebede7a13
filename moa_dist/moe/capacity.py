"""Capacity: how many assignments an expert accepts from one group of sequences, and which.

Counted per group of sequences (GShard's groups), so the same tokens are dropped whatever
the number of ranks, the micro-batch or the accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.config.routers import CapacityConfig
from moa_dist.moe.statistics import occurrences


def expert_capacity(num_tokens: Tensor, factor: float, top_k: int, num_experts: int) -> Tensor:
    """Return `min(ceil(factor * K * tokens / E), tokens)` for [N] token counts, int64.

    A token chooses an expert at most once, so no limit exceeds `tokens`.
    """
    # In fp64: fp32 would round ceil() up or down once counts pass 2**24. 1.1 * 10 is a bit more
    # than 11 in binary, which must not become 12.
    exact = factor * top_k * num_tokens.double() / num_experts
    return torch.minimum(torch.ceil(exact * (1 - 1e-14)).long(), num_tokens)


def keep_within_capacity(
    chosen_ids: Tensor,
    scores: Tensor,
    token_mask: Tensor | None,
    *,
    top_k: int,
    num_experts: int,
    num_sequence_groups: int,
    capacity: CapacityConfig,
    assigned: Tensor | None = None,
) -> Tensor:
    """Select the assignments that fit within the capacity of their experts.

    `chosen_ids` [T, G, K] experts within each router group, `scores` [T, G, K] their scores,
    `token_mask` [T] bool or None for all, `assigned` [T, G, K] bool, false for places that hold no
    assignment, or None. `top_k` experts per token fill an even load. Returns [T, G, K] bool, false
    for padding and empty places.
    """
    T, G, K = chosen_ids.shape
    N, device = num_sequence_groups, chosen_ids.device
    sequence_group = torch.arange(N, device=device).repeat_interleave(T // N)
    router_group = torch.arange(G, device=device)
    queue = (sequence_group[:, None] * G + router_group)[:, :, None] * num_experts + chosen_ids
    num_queues = N * G * num_experts
    if token_mask is not None:  # padding waits in a queue of its own, behind all others
        queue = queue.masked_fill(~token_mask[:, None, None], num_queues)
    if assigned is not None:
        queue = queue.masked_fill(~assigned, num_queues)
    queue = queue.flatten()

    if capacity.policy == "probability":
        order = scores.flatten().argsort(descending=True, stable=True)
        order = order[queue[order].argsort(stable=True)]
    elif capacity.policy == "choice":
        order = torch.arange(len(queue), device=device).view(T, G, K).permute(2, 0, 1).flatten()
        order = order[queue[order].argsort(stable=True)]
    else:
        order = queue.argsort(stable=True)
    lengths = occurrences(queue, num_queues + 1)
    starts = lengths.cumsum(0) - lengths
    place = torch.empty_like(queue)
    place[order] = torch.arange(len(queue), device=device) - starts[queue[order]]

    tokens = torch.ones(T, device=device).long() if token_mask is None else token_mask.long()
    tokens = tokens.view(N, -1).sum(1)
    limit = expert_capacity(tokens, capacity.factor, top_k, num_experts)
    limit = limit.repeat_interleave(G * num_experts)
    limit = torch.cat([limit, limit.new_zeros(1)])
    return (place < limit[queue]).view(T, G, K)
