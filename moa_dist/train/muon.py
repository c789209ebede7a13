"""Muon under any ZeRO stage: orthogonalized updates of matrices that ranks hold in flat pieces.

Jordan et al. 2024; scaled as in Moonlight (Liu et al. 2025, equation 4), so that AdamW's learning
rate and decay suit it. Momentum is elementwise, so its state is partitioned like AdamW's.
Orthogonalization needs whole matrices, and most of them lie within one rank's partition: at stages
1 and 2 only those at its two borders do not. The ranks that share a partitioned tensor sum those
few, each rank orthogonalizes some of them, and a second sum hands the results out.

Shapes: N matrices of R rows and C columns; an expert tensor [E, d_in, d_out] holds E of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.plan.orthogonalization import ITERATIONS, exchanges

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: singular values from 0.01 to 1 come out between 0.7 and 1.2."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of every matrix by about 1: [N, R, C] -> [N, R, C].

    Zero stays zero. Computes in the type of `matrices`: in bf16, as is usual, the layouts of one
    run would differ by a percent.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@dataclass(frozen=True)
class MatrixPiece:
    """The part of a parameter's matrices that this rank holds in a flat tensor."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, int]
    """Rows and columns of each matrix."""
    offset: int
    """First element of the piece in the flat tensor."""
    start: int
    """First element of the piece in the parameter, of which a rank may hold a shard."""
    numel: int
    """Elements of the piece."""

    def split(self) -> Iterator[MatrixPiece]:
        """Cut the piece into whole matrices of the parameter, together, and the parts of others."""
        size = math.prod(self.shape)
        end = self.start + self.numel
        first_whole, last_whole = -(-self.start // size) * size, end // size * size
        borders = sorted({self.start, min(first_whole, end), max(last_whole, self.start), end})
        for first, last in pairwise(borders):
            yield MatrixPiece(
                self.name, self.shape, self.offset + first - self.start, first, last - first
            )

    @property
    def is_whole(self) -> bool:
        """Whether the piece consists of whole matrices."""
        size = math.prod(self.shape)
        return self.start % size == 0 and self.numel % size == 0

    def view(self, flat: Tensor) -> Tensor:
        """Return the piece of `flat`: [N, R, C] if it is whole, else 1-D."""
        view = flat.view(-1).narrow(0, self.offset, self.numel)
        return view.view(-1, *self.shape) if self.is_whole else view


@dataclass(frozen=True)
class Partition:
    """A tensor that the optimizer knows, and the matrices of which it holds pieces."""

    flat: Tensor
    """The tensor, 1-D unless it is a parameter itself."""
    pieces: Sequence[MatrixPiece]
    """This rank's pieces."""
    group: dist.ProcessGroup | None
    """Ranks that hold the other pieces; None for all ranks."""


@dataclass(frozen=True)
class _Part:
    """A part of a matrix that several ranks share."""

    piece: MatrixPiece
    position: int
    """First element of the part in the buffer of shared matrices."""


@dataclass(frozen=True)
class _Layout:
    """Which matrices of a partition are whole on this rank, and which are shared."""

    whole: list[MatrixPiece]
    shared: list[list[tuple[int, int]]]
    """Shapes of all matrices that some ranks share, equal on all of them, a list per exchange."""
    parts: list[list[_Part]]
    """This rank's parts of them, a list per exchange."""
    group: dist.ProcessGroup | None


class Muon(torch.optim.AdamW):
    """Muon for groups with `muon` set, AdamW for all others."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self._momentum = momentum
        self._layouts: dict[Tensor, _Layout] = {}

    def set_partitions(self, partitions: Sequence[Partition]) -> None:
        """Learn where the matrices are once ZeRO has partitioned them. Collective."""
        self._layouts = {partition.flat: _lay_out(partition) for partition in partitions}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters. Collective over the ranks that share partitions."""
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    self._update(parameter, group)
        super().step(closure)  # leaves out what has no gradient

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Consume the gradient of a parameter, or of a partition of several."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(average, self._momentum)  # Nesterov
        layout = self._layouts.get(parameter) or _whole(parameter)
        for piece in layout.whole:
            view = piece.view(update)
            view.copy_(_scaled(orthogonalize(view)))
        for shapes, parts in zip(layout.shared, layout.parts, strict=True):
            _orthogonalize_shared(update, shapes, parts, layout.group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def _scaled(update: Tensor) -> Tensor:
    """Scale orthogonal matrices [N, R, C] to the root mean square of AdamW's updates."""
    return update * (0.2 * math.sqrt(max(update.shape[1:])))


def _whole(parameter: Tensor) -> _Layout:
    """Describe a parameter that ZeRO did not partition."""
    rows, columns = parameter.shape[-2:]
    piece = MatrixPiece("", (rows, columns), 0, 0, parameter.numel())
    return _Layout([piece], [], [], None)


def _lay_out(partition: Partition) -> _Layout:
    pieces = [part for piece in partition.pieces for part in piece.split()]
    own = [piece for piece in pieces if not piece.is_whole]
    every: list[Any] = [None] * dist.get_world_size(partition.group)
    dist.all_gather_object(every, [_matrix(piece) for piece in own], group=partition.group)
    cut = dict.fromkeys(matrix for of_rank in every for matrix in of_rank)
    exchanged = exchanges(cut, lambda matrix: math.prod(matrix[2]))
    parts = [_parts(own, exchange) for exchange in exchanged]
    shapes = [[shape for _, _, shape in exchange] for exchange in exchanged]
    whole = [piece for piece in pieces if piece.is_whole]
    return _Layout(whole, shapes, parts, partition.group)


def _matrix(piece: MatrixPiece) -> tuple[str, int, tuple[int, int]]:
    """Identify the matrix that a part belongs to."""
    return piece.name, piece.start // math.prod(piece.shape), piece.shape


def _parts(own: list[MatrixPiece], exchange: list[tuple[str, int, tuple[int, int]]]) -> list[_Part]:
    """Find this rank's parts of the matrices of an exchange."""
    positions, end = {}, 0
    for matrix in exchange:
        positions[matrix] = end
        end += math.prod(matrix[2])
    return [
        _Part(piece, positions[matrix] + piece.start % math.prod(piece.shape))
        for piece in own
        if (matrix := _matrix(piece)) in positions
    ]


def _orthogonalize_shared(
    update: Tensor,
    shapes: list[tuple[int, int]],
    parts: list[_Part],
    group: dist.ProcessGroup | None,
) -> None:
    """Orthogonalize matrices of which `update` holds parts, in place. Collective over `group`."""
    buffer = update.new_zeros(sum(map(math.prod, shapes)))
    for part in parts:
        buffer.narrow(0, part.position, part.piece.numel).copy_(part.piece.view(update))
    dist.all_reduce(buffer, group=group)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    for i, matrix in enumerate(buffer.split([math.prod(shape) for shape in shapes])):
        view = matrix.view(1, *shapes[i])
        if i % num_ranks == rank:
            view.copy_(_scaled(orthogonalize(view)))
        else:
            view.zero_()
    dist.all_reduce(buffer, group=group)
    for part in parts:
        part.piece.view(update).copy_(buffer.narrow(0, part.position, part.piece.numel))
