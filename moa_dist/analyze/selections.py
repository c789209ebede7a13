"""Counts which experts a router chose, batch by batch, in constant memory.

Shapes: T tokens, V vocabulary, R repeats of the router's layer, E experts of all its groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_dist.moe.router import Routing


class Selections:
    """Counts the choices of one router in all repeats of its layer, including dropped choices.

    The largest table takes 4 bytes per vocabulary entry and expert.
    """

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        choices: int,
        num_repeats: int,
        device: torch.device,
    ) -> None:
        """Start at zero; a token makes up to `choices` choices per repeat, over all groups."""

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.choices = choices
        self.tokens_VE = zeros(vocab_size, num_experts, dtype=torch.int32)
        """How often each token chose each expert, over all repeats."""
        self.load_RE = zeros(num_repeats, num_experts)
        """How often each expert was chosen."""
        self.dropped_RE = zeros(num_repeats, num_experts)
        """How many of those choices were dropped for lack of capacity."""
        self.together_EE = zeros(num_experts, num_experts)
        """How often a token chose both experts in one repeat; on the diagonal, how often it chose
        the expert."""
        self.common_RR = zeros(num_repeats, num_repeats)
        """Number of experts that a token chose in both repeats, summed over tokens."""
        self.distinct = zeros(min(num_repeats * choices, num_experts) + 1)
        """Number of tokens by the number of distinct experts that they chose over all repeats."""

    def add(self, tokens: Tensor, token_mask: Tensor, routings: Sequence[Routing]) -> None:
        """Count a batch: `tokens` [T] int64, `token_mask` [T] bool, and a routing per repeat."""
        num_experts = self.load_RE.shape[1]
        ids_RTK = torch.stack([routing.topk_ids.flatten(1) for routing in routings])[:, token_mask]
        size = (*ids_RTK.shape[:2], num_experts)
        places_RTK = torch.stack([_places(routing).flatten(1) for routing in routings])[
            :, token_mask
        ]
        # fp32 sums ones and zeros exactly if a batch has fewer than 2^24 choices.
        chosen_RTE = torch.zeros(size, device=ids_RTK.device).scatter_(2, ids_RTK, places_RTK)
        flat = chosen_RTE.flatten(0, 1)
        by_repeat = chosen_RTE.flatten(1)
        total_TE = chosen_RTE.sum(0)
        self.tokens_VE.index_add_(0, tokens[token_mask], total_TE.to(torch.int32))
        self.load_RE += chosen_RTE.sum(1).long()
        self.together_EE += (flat.T @ flat).long()
        self.common_RR += (by_repeat @ by_repeat.T).long()
        num_distinct_T = (total_TE > 0).sum(1)
        self.distinct += num_distinct_T.bincount(minlength=len(self.distinct))
        for dropped_E, routing in zip(self.dropped_RE, routings, strict=True):
            dropped_E += routing.statistics.dropped.sum(0).flatten()


def _places(routing: Routing) -> Tensor:
    """Return [T, G, K], 1 for places that hold an expert."""
    ids = routing.topk_ids
    if routing.assigned is None:
        return torch.ones(ids.shape, device=ids.device)
    return routing.assigned.float()
