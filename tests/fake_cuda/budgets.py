"""What one micro-batch of 8 x 1,024 tokens may cost on a GPU of compute capability 9.0, in bf16."""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """Upper bounds, forward and backward pass together."""

    kernels: int
    """Kernels launched."""
    gb_full: float
    """1e9 bytes moved, a gathered operand counted once per gathered row."""
    gb_distinct: float
    """1e9 bytes moved, a gathered operand counted once per distinct row."""
    gib_saved: float
    """2^30 bytes kept for the backward pass."""


BUDGETS = {
    "configs/moeut/44m.yaml": Budget(1770, 42.5, 34, 1.8),
    "configs/moeut/244m.yaml": Budget(1750, 115, 88, 3.2),
    "configs/moa/8k16e256d.yaml": Budget(500, 19.4, 17.4, 1.3),
    "configs/switchhead/big.yaml": Budget(1280, 60, 51, 3.4),
    "configs/jetmoe/8b.yaml": Budget(2150, 265, 258, 20.4),
    "configs/dense/244m.yaml": Budget(680, 42, 42, 3.65),
}
"""By configuration."""
