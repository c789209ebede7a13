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
    "configs/moeut/44m.yaml": Budget(3670, 62, 38, 1.8),
    "configs/moeut/244m.yaml": Budget(2670, 390, 390, 38.8),
    "configs/moa/8k16e256d.yaml": Budget(700, 49, 49, 4.6),
    "configs/switchhead/big.yaml": Budget(1830, 161, 161, 15.9),
    "configs/jetmoe/8b.yaml": Budget(4400, 628, 628, 49.7),
    "configs/dense/244m.yaml": Budget(710, 44, 44, 3.7),
}
"""By configuration."""
