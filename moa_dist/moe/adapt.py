"""State of routers that no gradient moves: it follows the load of each optimizer step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moa_dist.moe.router import Router

Key = TypeVar("Key", bound=Hashable)


class StepLoad(NamedTuple):
    """What one router did in a step: all tokens of all ranks, micro-batches and repeats."""

    load: Tensor
    """[G, E] int64, assignments per expert before dropping."""
    pairs: Tensor
    """[] int64, pairs of a token and a router group that it chose experts in."""
    own: Tensor
    """[M] fp64, see `RoutingStatistics`."""

    def plus(self, other: StepLoad) -> StepLoad:
        """Add up applications."""
        return StepLoad(*(a + b for a, b in zip(self, other, strict=True)))


def adaptive(routers: Mapping[Key, Router]) -> dict[Key, Router]:
    """Return the routers that `adapt` changes."""
    return {
        key: router
        for key, router in routers.items()
        if any(state is not None for state in (router.bias, router.sparsity, router.running))
    }


@torch.no_grad()
def adapt(routers: Mapping[Key, Router], steps: Mapping[Key, StepLoad]) -> None:
    """Move selection biases, coefficients of sparsity and running moments by a step's load.

    Call it once per optimizer step with the sums over all ranks, so that all ranks stay equal.
    Routers of one configuration share one sparsity, the mean over their layers.
    """
    for key, router in routers.items():
        if router.bias is not None:
            router.bias.update(steps[key].load)
        if router.running is not None:
            router.running.update(steps[key].own, steps[key].pairs)
    alike: dict[object, list[Key]] = {}
    for key, router in routers.items():
        if router.sparsity is not None:
            alike.setdefault(router.config, []).append(key)
    for keys in alike.values():
        assignments = torch.stack([steps[key].load.sum() for key in keys]).sum()
        pairs = torch.stack([steps[key].pairs for key in keys]).sum()
        for key in keys:
            sparsity = routers[key].sparsity
            assert sparsity is not None
            sparsity.update(assignments, pairs * routers[key].config.top_k)
