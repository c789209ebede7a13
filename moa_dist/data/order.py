"""The order of samples: a pure function of (seed, shards, samples per shard, readers, index).

If damaged shards are left out, also of which and since when (see `Exclusion`).

The shards form an endless sequence: a fresh permutation for each epoch, end to end. M readers
take it in windows of M positions, and sample g comes from reader g mod M:

    window g // (M * S)   position = window * M + g mod M   step = (g mod (M * S)) // M

A number of ranks W that divides M gives rank g mod W the readers m with m mod W = rank, so every
such W sees the same global batches, and a resumed run needs nothing but the number of samples
consumed. Rows are permuted within the shard, by seed and position.

A shard left out loses its places in the endless sequence, and those behind it move up: every
sample of the others still comes once per epoch. A change in the middle of a run takes effect
with the next window, so shards that are open are read to their end; only one that is itself
damaged is replaced by another for the rest of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, TypeAdapter

_EPOCH, _ROWS = 0, 1


class Exclusion(NamedTuple):
    """Which shards are left out from some sample on, until the next exclusion."""

    since: int
    """First global sample that it holds for."""
    shards: tuple[int, ...]
    """Indices in the manifest, sorted; empty when all are whole again."""


Exclusions = tuple[Exclusion, ...]
"""The history of a run, in order of `since`."""
_HISTORY = TypeAdapter(Exclusions)


def as_json(history: Exclusions) -> JsonValue:
    """For a checkpoint; see `read_exclusions`."""
    return [[exclusion.since, list(exclusion.shards)] for exclusion in history]


def read_exclusions(value: JsonValue) -> Exclusions:
    """What `as_json` wrote; none from None."""
    return _HISTORY.validate_python(value or ())


def exclude(history: Exclusions, sample: int, shards: tuple[int, ...]) -> Exclusions:
    """History of a run that goes on at `sample` without `shards`; as it was if nothing changes."""
    current = history[-1].shards if history else ()
    return history if shards == current else (*history, Exclusion(sample, shards))


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
    exclusions: Exclusions = ()
    """Shards left out; never all of them."""

    def sample_location(self, sample: int) -> tuple[int, int]:
        """Shard and row of global sample `sample`, which may be any number from 0."""
        position, step = self.locate(sample)
        return self.shard_of(sample), int(self.rows_at(position)[step])

    def locate(self, sample: int) -> tuple[int, int]:
        """Position in the endless sequence of shards, and step within that shard."""
        window, offset = divmod(sample, self.readers * self.samples_per_shard)
        step, reader = divmod(offset, self.readers)
        return window * self.readers + reader, step

    def shard_of(self, sample: int) -> int:
        """Shard that global sample `sample` comes from."""
        position, _ = self.locate(sample)
        shard = self.shard_at(position)
        exclusion = self._exclusion_at(sample)
        if exclusion is None or shard not in exclusion.shards:
            return shard
        whole = [s for s in range(self.num_shards) if s not in exclusion.shards]
        return whole[position % len(whole)]

    def shard_at(self, position: int) -> int:
        """Shard at a position of the endless sequence."""
        epoch, index = divmod(self._turn(position), self.num_shards)
        return int(self._epoch(epoch)[index])

    def rows_at(self, position: int) -> NDArray[np.intp]:
        """Order in which the rows of the shard at this position are taken, [S]."""
        return seeded_permutation(self.samples_per_shard, self.seed, _ROWS, position)

    def _turn(self, position: int) -> int:
        """Place in the sequence of all shards that `position` has without those left out."""
        window = self.readers * self.samples_per_shard
        exclusion = self._exclusion_at(position // self.readers * window)
        if exclusion is None:
            return position
        first = -(-exclusion.since // window) * self.readers
        turn = self._turn(first - 1) + 1 if first else 0
        count = position - first
        epoch, offset = divmod(turn, self.num_shards)
        places = self._places(epoch, offset, exclusion)
        if count >= len(places):
            more, count = divmod(count - len(places), self.num_shards - len(exclusion.shards))
            epoch += 1 + more
            places = self._places(epoch, 0, exclusion)
        return epoch * self.num_shards + int(places[count])

    def _places(self, epoch: int, offset: int, exclusion: Exclusion) -> NDArray[np.intp]:
        """Indices from `offset` on in an epoch's shards that are not left out."""
        left_out = np.isin(self._epoch(epoch)[offset:], exclusion.shards)
        return offset + np.flatnonzero(~left_out)

    def _exclusion_at(self, sample: int) -> Exclusion | None:
        return next((e for e in reversed(self.exclusions) if e.since <= sample), None)

    def _epoch(self, epoch: int) -> NDArray[np.intp]:
        return _cached_permutation(self.num_shards, self.seed, _EPOCH, epoch)


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
