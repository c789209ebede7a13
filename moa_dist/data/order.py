"""The order of samples: a pure function of (seed, shards, samples per shard, readers, index).

The shards form an endless sequence: a fresh permutation for each epoch, end to end. M readers
take it in windows of M positions, and sample g comes from reader g mod M:

    window g // (M * S)   position = window * M + g mod M   step = (g mod (M * S)) // M

A number of ranks W that divides M gives rank g mod W the readers m with m mod W = rank, so every
such W sees the same global batches, and a resumed run needs nothing but the number of samples
consumed. Rows are permuted within the shard, by seed and position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_EPOCH, _ROWS = 0, 1


@dataclass(frozen=True)
class SampleOrder:
    """Where each global sample is stored."""

    seed: int
    """Another seed gives another order."""
    num_shards: int
    """Shards in the folder."""
    samples_per_shard: int
    """Samples in each of them (S)."""
    readers: int
    """Shards read side by side (M)."""

    def sample_location(self, sample: int) -> tuple[int, int]:
        """Shard and row of global sample `sample`, which may be any number from 0."""
        position, step = self.locate(sample)
        return self.shard_at(position), int(self.rows_at(position)[step])

    def locate(self, sample: int) -> tuple[int, int]:
        """Position in the endless sequence of shards, and step within that shard."""
        window, offset = divmod(sample, self.readers * self.samples_per_shard)
        step, reader = divmod(offset, self.readers)
        return window * self.readers + reader, step

    def shard_at(self, position: int) -> int:
        """Shard at a position of the endless sequence."""
        epoch, index = divmod(position, self.num_shards)
        return int(_cached_permutation(self.num_shards, self.seed, _EPOCH, epoch)[index])

    def rows_at(self, position: int) -> NDArray[np.intp]:
        """Order in which the rows of the shard at this position are taken, [S]."""
        return seeded_permutation(self.samples_per_shard, self.seed, _ROWS, position)


def seeded_permutation(length: int, *key: int) -> NDArray[np.intp]:
    """Permutation of `range(length)` for a key of non-negative integers, [length].

    It sorts the raw output of PCG64, which numpy promises to keep for a `SeedSequence` (unlike
    `Generator.permutation`), so the order survives another version or machine.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")


@lru_cache(maxsize=8)  # windows touch one or two epochs at a time, more when shards are few
def _cached_permutation(length: int, *key: int) -> NDArray[np.intp]:
    return seeded_permutation(length, *key)
