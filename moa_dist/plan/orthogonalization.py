"""Counts what Muon computes and exchanges in a step, as `moa_dist.train.muon` distributes it.

ZeRO partitions dense matrices over all ranks and experts over those that hold copies. A rank
orthogonalizes the matrices that lie within its partition, which is how experts are computed in
batches; those that a border cuts are summed over the ranks, dealt out to them in turn, and summed
once more. Ranks wait for each other before and after, so the busiest one counts.

Shapes: matrices of R rows and C columns; N ranks that partition them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import NamedTuple, TypeVar

from moa_dist.plan.predicted_traffic import ALIGNMENT, round_up

T = TypeVar("T")

ITERATIONS = 5
"""Newton-Schulz iterations per update."""
EXCHANGED_AT_ONCE = 1 << 26
"""Most elements of cut matrices in one collective."""


class Matrices(NamedTuple):
    """A tensor of equal matrices, such as those of a layer's experts on one rank."""

    number: int
    """How many."""
    rows: int
    """Rows of each (R)."""
    columns: int
    """Columns of each (C)."""

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrices:
        """Take the last two dimensions of a parameter as a matrix, as Muon does."""
        return cls(prod(shape[:-2]), *shape[-2:])

    @property
    def size(self) -> int:
        """Elements of each."""
        return self.rows * self.columns

    @property
    def numel(self) -> int:
        """Elements of all."""
        return self.number * self.size

    @property
    def flops(self) -> int:
        """FLOPs of orthogonalizing one of them: per iteration `X X^T`, its square, and `P X`."""
        short, long = sorted((self.rows, self.columns))
        return ITERATIONS * (4 * short * short * long + 2 * short**3)

    @property
    def num_bytes(self) -> int:
        """Bytes that updating one of them in fp32 moves through memory.

        Per iteration, X is read three times and written once, and X X^T read four times and written
        twice. Momentum, scaling, decay and step take 18 more passes over the matrix.
        """
        short = min(self.rows, self.columns)
        return 4 * (ITERATIONS * (4 * self.size + 6 * short * short) + 18 * self.size)


@dataclass
class Orthogonalization:
    """Work of one step for one group of matrices that are partitioned alike."""

    busiest: Counter[Matrices]
    """Matrices of each shape (a tensor of one) that the busiest rank orthogonalizes."""
    exchanges: list[int] = field(default_factory=list)
    """Elements of cut matrices in each exchange, which takes two all-reduces."""

    @property
    def flops(self) -> int:
        """FLOPs of the busiest rank."""
        return _flops(self.busiest)

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank moves through its memory."""
        return sum(number * matrix.num_bytes for matrix, number in self.busiest.items())


@cache
def orthogonalization(
    tensors: tuple[Matrices, ...], zero_stage: int, num_ranks: int
) -> Orthogonalization:
    """Count the work for `tensors`, which stages 1 and 2 lay end to end and stage 3 cuts each."""
    whole: dict[int, Counter[Matrices]] = defaultdict(Counter)
    cut: list[tuple[int, int, int, Matrices]] = []
    for i, rank, start, end in _pieces(tensors, zero_stage, num_ranks):
        size, matrix = tensors[i].size, tensors[i]._replace(number=1)
        whole[rank][matrix] += max(0, end // size - -(-start // size))
        # Of each side that lies within a matrix; both may lie within the same one.
        sides = {side // size for side in (start, end) if side % size}
        cut += [(rank, i, side, matrix) for side in sides]
    result = Orthogonalization(max(whole.values(), key=_flops, default=Counter()))
    # In the order in which ranks name them.
    shared = {(i, index): matrix for _, i, index, matrix in sorted(cut)}
    for exchange in exchanges(shared.values(), lambda matrix: matrix.size):
        dealt = (Counter(exchange[rank::num_ranks]) for rank in range(num_ranks))
        result.busiest.update(max(dealt, key=_flops))
        result.exchanges.append(sum(matrix.size for matrix in exchange))
    return result


def _flops(matrices: Mapping[Matrices, int]) -> int:
    return sum(number * matrix.flops for matrix, number in matrices.items())


def _pieces(
    tensors: Sequence[Matrices], zero_stage: int, num_ranks: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield what ranks hold: index of the tensor, rank, first element of it, and the end."""
    numels = [tensor.numel for tensor in tensors]
    flat = round_up(sum(numels), ALIGNMENT * num_ranks) // num_ranks
    offset = 0
    for i, numel in enumerate(numels):
        match zero_stage:
            case 0:  # every rank updates all
                part, offset = numel, 0
            case 3:
                part, offset = -(-numel // num_ranks), 0
            case _:
                part = flat
        for rank in range(offset // part, -(-(offset + numel) // part)):
            yield i, rank, max(0, rank * part - offset), min(numel, (rank + 1) * part - offset)
        offset += numel


def exchanges(matrices: Iterable[T], numel: Callable[[T], int]) -> list[list[T]]:
    """Group cut matrices, of so many elements each, by the collectives that exchange them."""
    found: list[list[T]] = []
    size = EXCHANGED_AT_ONCE
    for matrix in matrices:
        if size + numel(matrix) > EXCHANGED_AT_ONCE:
            found.append([])
            size = 0
        found[-1].append(matrix)
        size += numel(matrix)
    return found
