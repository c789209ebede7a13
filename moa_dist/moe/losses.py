"""Balance losses of routers: a function each, and a line in `BALANCE_LOSSES`.

Each maps statistics to a scalar, a mean over groups of sequences and router groups. A group without
real tokens contributes zero, and the mean always runs over all groups, so averaging over equal
micro-batches and ranks gives the value of the whole batch. `BalanceConfig.scope` defines a group;
`moa_dist.models.aux_losses` applies it. Routers may be stacked in front of all dimensions: the
mean runs over them too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moa_dist.config.routers import BalanceConfig
from moa_dist.moe.statistics import RoutingStatistics


def switch_loss(statistics: RoutingStatistics) -> Tensor:
    """`E * sum_e f_e P_e` (Fedus et al. 2021, equation 4): 1 when even, E when collapsed."""
    num_experts = statistics.load.shape[-1]
    assignments = statistics.load.sum(-1, keepdim=True).clamp(min=1)
    probability = statistics.mean_probability
    share = statistics.load.to(probability.dtype) / assignments
    return num_experts * (share * probability).sum(-1).mean()


def z_loss(statistics: RoutingStatistics) -> Tensor:
    """Return the mean squared logsumexp of the logits (Zoph et al. 2022, equation 5)."""
    return (statistics.z / statistics.divisor[..., None]).mean()


def entropy_loss(statistics: RoutingStatistics) -> Tensor:
    """Return minus the entropy of the mean probability, nats (Csordas et al. 2024, equation 7)."""
    probability = statistics.mean_probability
    # Clamped, since the slope of p log p at 0 is infinite: an expert that a sequence never
    # considers, or a sequence that is all padding, would make every gradient NaN.
    log = probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
    return (probability * log).sum(-1).mean()


def mutual_information_loss(statistics: RoutingStatistics) -> Tensor:
    """`H(e|x) - H(e)`, minus the mutual information of tokens and experts, nats: 0 to -log E.

    Low where each token is sure of its experts and all tokens together use them evenly (Mod-Squad,
    Chen et al. 2022, arXiv 2212.08066; SUT, Tan et al. 2023, arXiv 2310.07096).
    """
    return (statistics.entropy / statistics.divisor[..., None]).mean() + entropy_loss(statistics)


BALANCE_LOSSES: dict[str, Callable[[RoutingStatistics], Tensor]] = {
    "switch": switch_loss,
    "z_loss": z_loss,
    "entropy": entropy_loss,
    "mutual_information": mutual_information_loss,
}
"""Losses by the name of their coefficient in `BalanceConfig`."""


def balance_losses(statistics: RoutingStatistics, config: BalanceConfig) -> dict[str, Tensor]:
    """Compute the losses that have a non-zero coefficient, each a scalar multiplied by it."""
    coefficients = {name: getattr(config, name) for name in BALANCE_LOSSES}
    return {
        name: coefficient * BALANCE_LOSSES[name](statistics)
        for name, coefficient in coefficients.items()
        if coefficient
    }
