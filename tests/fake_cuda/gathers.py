"""Which operands of our Triton kernels are rows that an index gathers."""

from __future__ import annotations

from typing import NamedTuple


class Gather(NamedTuple):
    """Rows read or written by index."""

    rows: str
    """Name of the operand whose rows are meant."""
    index: str
    """Name of the operand that has one integer per row read or written. Where a launch does not
    gather, it is None or some other tensor."""


GATHERS: dict[str, tuple[Gather, ...]] = {
    "_product": (Gather("left", "read"), Gather("more_left", "read")),
    "_hidden_products": (Gather("x", "read"),),
    "_weigh_gradient": (Gather("grad", "write"),),
    "_hidden_gradients": (Gather("grad", "read_grad"), Gather("inner", "read_inner")),
    "_outer_products": (Gather("left", "read_left"), Gather("right", "read_right")),
}
"""By the name of the kernel; one that is missing here reads each operand once."""

UPDATED = {"_outer_products": (("before", "out"),)}
"""Pairs of operands that may be one tensor, which is then read and written."""
