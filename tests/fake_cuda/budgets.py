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
    "configs/moeut/44m.yaml": Budget(1920, 43.5, 35.2, 1.8),
    "configs/moeut/244m.yaml": Budget(1930, 122, 94, 3.2),
    "configs/moa/8k16e256d.yaml": Budget(530, 20, 18, 1.3),
    "configs/switchhead/big.yaml": Budget(1380, 64, 55, 3.4),
    "configs/jetmoe/8b.yaml": Budget(3350, 388, 381, 24.6),
    "configs/dense/244m.yaml": Budget(715, 43.5, 43.5, 3.65),
}
"""By configuration."""
