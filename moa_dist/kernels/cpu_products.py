"""Products of rows with the matrices of their experts on a CPU, in few shapes.

OneDNN, which computes fp32 and bf16, compiles code for every shape that it meets, and keeps that of
the last thousand. Loads differ between experts and between batches, so that nearly every product
would be compiled anew, which takes longer than the products. So their numbers of rows are rounded
up. The excess rows are those of the next experts, which are gathered anyway, and their results are
not used. Shapes as in `row_map`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moa_dist.kernels.gradient_sum import Into
from moa_dist.kernels.row_map import sum_type


def multiply(
    rows: Tensor, matrices: Tensor, counts: list[int], out: Tensor, *, add: bool = False
) -> Tensor:
    """Multiply rows [a, I], sorted by expert, by their expert's matrix [e, I, O].

    Sets `out` [a, O], or adds to it, and returns it.
    """
    windows = zip(_windows(rows, counts), matrices, out.split(counts), counts, strict=True)
    for window, matrix, result, count in windows:
        product = _product(window, matrix)[:count]
        if add:
            result.add_(product)
        else:
            result.copy_(product)
    return out


def outer(left: Tensor, right: Tensor, counts: list[int], into: Into, experts: slice) -> None:
    """Compute `left.T @ right` of the rows [a, I] and [a, O] of each of some experts.

    An expert without rows gets zeros, or its total.
    """
    out, total = into
    wide = left.dtype if total is None and out.dtype == left.dtype else sum_type(left)
    # Excess rows of one operand must be zeros: of the narrower one, because they are copied.
    narrow_left = left.shape[1] < right.shape[1]
    lefts = _windows(left, counts, zeros=narrow_left)
    rights = _windows(right, counts, zeros=not narrow_left)
    for e, a, b in zip(range(out.shape[0])[experts], lefts, rights, strict=True):
        product = _product(a.to(wide).T, b.to(wide))
        if total is None:
            out[e] = product
        else:
            torch.add(total[e], product, out=out[e])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`, by oneDNN in fp32 too, where torch by itself uses MKL.

    MKL keeps to half the width of vectors that AMD's processors have.
    """
    if left.dtype == torch.float32 and left.numel() and torch.backends.mkldnn.is_available():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
        return result
    return left @ right


def _rounded(count: int) -> int:
    """Round up by less than 32 or an eighth, to at most 8 numbers between powers of two."""
    multiple = max(32, 1 << max(count.bit_length() - 4, 0))
    return -(-count // multiple) * multiple


def _windows(rows: Tensor, counts: list[int], *, zeros: bool = False) -> Iterator[Tensor]:
    """Yield the rows of each expert, and excess rows: those that follow, or zeros."""
    start, num_rows = 0, rows.shape[0]
    for count in counts:
        size = _rounded(count)
        stop = start + count if zeros else min(start + size, num_rows)
        window, missing = rows[start:stop], start + size - stop
        if missing:
            window = torch.cat([window, rows.new_zeros(missing, rows.shape[1])])
        yield window
        start += count
