"""Computes information measures from counts. All logarithms are natural.

Shapes: V vocabulary, R repeats of a layer, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.signedinteger[Any]]


def pointwise_information(counts_VE: Counts, rows_N: Counts) -> Floats:
    """Compute PMI(v, e) = log p(v, e) / (p(v) p(e)) for the tokens v in `rows_N`, [N, E].

    Probabilities are shares of all choices, those of other tokens included, as in MoA's table of
    tokens per expert (Zhang et al. 2022). The result is minus infinity where v never chose e.
    """
    counts = counts_VE[rows_N].astype(np.float64)
    expected = counts.sum(1, keepdims=True) * counts_VE.sum(0) / max(counts_VE.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, np.log(counts / expected), -np.inf)


def mutual_information(counts_VE: Counts) -> float:
    """Compute the mutual information of token and expert: the mean PMI of all choices, in nats."""
    return float(entropy(counts_VE.sum(0)) + entropy(counts_VE.sum(1)) - entropy(counts_VE.ravel()))


def entropy(counts: Counts) -> Floats:
    """Compute the entropy along the last axis, in nats; zero where nothing was counted."""
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def repeat_shares(load_RE: Counts) -> Floats:
    """Compute the share of each expert's load in each repeat, [R, E]; NaN without any load."""
    total_E = load_RE.sum(0).astype(np.float64)
    total_E[total_E == 0] = np.nan
    return load_RE / total_E


def overlap(common_RR: Counts, num_tokens: int, choices: int) -> Floats:
    """Compute the share of a token's `choices` experts that another repeat reuses, [R, R]."""
    return common_RR / max(num_tokens * choices, 1)


def chance_overlap(load_RE: Counts, num_tokens: int, choices: int) -> Floats:
    """Compute the `overlap` expected at random: the same loads, regardless of the token, [R, R]."""
    chosen_RE = load_RE / max(num_tokens, 1)
    return chosen_RE @ chosen_RE.T / choices


def pair_information(together_EE: Counts, num_decisions: int) -> Floats:
    """Compute log p(e, f) / (p(e) p(f)), p(e) being the share of decisions that choose e, [E, E].

    A decision is a token in one repeat. The result is minus infinity for pairs that never occur
    together. If K of E experts were drawn uniformly at random, it would be
    log (1 - 1/K) / (1 - 1/E), just below zero.
    """
    chosen_E = np.diagonal(together_EE).astype(np.float64)
    expected = chosen_E[:, None] * chosen_E / max(num_decisions, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(together_EE > 0, np.log(together_EE / expected), -np.inf)


def depth_order(load_RE: Counts) -> NDArray[np.int64]:
    """Order experts by mean repeat, unused ones last; by number if there is one repeat, [E]."""
    if len(load_RE) == 1:
        return np.arange(load_RE.shape[1], dtype=np.int64)
    mean_repeat_E = (repeat_shares(load_RE) * np.arange(len(load_RE))[:, None]).sum(0)
    return np.argsort(mean_repeat_E, kind="stable").astype(np.int64)
