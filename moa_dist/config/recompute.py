"""Which activations the backward pass computes again."""

from __future__ import annotations

from typing import Literal

Recompute = bool | tuple[Literal["attention", "ffn", "experts"], ...]
"""Which activations the backward pass computes again: see `TrainConfig.recompute`."""


def recomputed_parts(recompute: Recompute) -> frozenset[str]:
    """Return the parts of a layer that are computed again; `block` stands for all of it."""
    if isinstance(recompute, bool):
        return frozenset({"block"} if recompute else ())
    return frozenset(recompute)
