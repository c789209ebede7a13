"""Orders samples: a pure function of (seed, shards, samples per shard, readers, index).

If damaged shards are excluded, the order also depends on which, and since when (see `Exclusion`).

The shards form an endless sequence, a fresh permutation for each epoch. M readers take it in
windows of M positions, and sample g comes from reader g mod M:

    window g // (M * S)   position = window * M + g mod M   step = (g mod (M * S)) // M

If the number of ranks W divides M, rank r gets the readers m with m mod W = r. Every such W
therefore sees the same global batches, and a resumed run needs only the number of samples consumed.
Rows are permuted within each shard, by seed and position.

An excluded shard loses its positions in the endless sequence, and those after it move up: every
sample of the other shards still comes once per epoch. A change in the middle of a run takes effect
at the next window, so open shards are read to their end; only a shard that is itself damaged is
replaced by another for the rest of the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, TypeAdapter

_EPOCH, _ROWS = 0, 1


class Exclusion(NamedTuple):
    """Lists the shards excluded from some sample on, until the next exclusion."""

    since: int
    """First global sample that it applies to."""
    shards: tuple[int, ...]
    """Indices in the manifest, sorted; empty when all shards are intact again."""


Exclusions = tuple[Exclusion, ...]
"""All exclusions of a run, ordered by `since`."""
_HISTORIES = TypeAdapter(dict[str, Exclusions])


def as_json(histories: Mapping[str, Exclusions]) -> JsonValue:
    """Convert the history of each source to JSON; `read_exclusions` is the inverse."""
    return {
        name: [[exclusion.since, list(exclusion.shards)] for exclusion in history]
        for name, history in histories.items()
    }


def read_exclusions(value: JsonValue) -> dict[str, Exclusions]:
    """Read what `as_json` wrote; None means no exclusions."""
    return _HISTORIES.validate_python(value or {})


def exclude(history: Exclusions, sample: int, shards: tuple[int, ...]) -> Exclusions:
    """Extend the history of a run that continues at `sample` without `shards`, if that is new."""
    current = history[-1].shards if history else ()
    return history if shards == current else (*history, Exclusion(sample, shards))


@dataclass(frozen=True)
class SampleOrder:
    """Maps each global sample to the shard and row that store it."""

    seed: int
    """Seed of all permutations."""
    num_shards: int
    """Number of shards in the folder."""
    samples_per_shard: int
    """Number of samples in each shard (S)."""
    readers: int
    """Number of shards read in parallel (M)."""
    exclusions: Exclusions = ()
    """Excluded shards; never all of them."""

    def sample_location(self, sample: int) -> tuple[int, int]:
        """Return shard and row of a global sample, any number from 0."""
        position, step = self.locate(sample)
        return self.shard_of(sample), int(self.rows_at(position)[step])

    def locate(self, sample: int) -> tuple[int, int]:
        """Return a sample's position in the endless sequence of shards, and its step there."""
        window, offset = divmod(sample, self.readers * self.samples_per_shard)
        step, reader = divmod(offset, self.readers)
        return window * self.readers + reader, step

    def shard_of(self, sample: int) -> int:
        """Return the shard that a global sample comes from."""
        position, _ = self.locate(sample)
        shard = self.shard_at(position)
        exclusion = self._exclusion_at(sample)
        if exclusion is None or shard not in exclusion.shards:
            return shard
        intact = [s for s in range(self.num_shards) if s not in exclusion.shards]
        return intact[position % len(intact)]

    def shard_at(self, position: int) -> int:
        """Return the shard at a position of the endless sequence."""
        epoch, index = divmod(self._turn(position), self.num_shards)
        return int(self._epoch(epoch)[index])

    def rows_at(self, position: int) -> NDArray[np.intp]:
        """Return the order in which the rows of the shard at this position are read, [S]."""
        return seeded_permutation(self.samples_per_shard, self.seed, _ROWS, position)

    def _turn(self, position: int) -> int:
        """Map a position to the sequence of all shards, excluded ones included."""
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
        """Return the indices from `offset` on of an epoch's shards that are not excluded."""
        excluded = np.isin(self._epoch(epoch)[offset:], exclusion.shards)
        return offset + np.flatnonzero(~excluded)

    def _exclusion_at(self, sample: int) -> Exclusion | None:
        return next((e for e in reversed(self.exclusions) if e.since <= sample), None)

    def _epoch(self, epoch: int) -> NDArray[np.intp]:
        return _cached_permutation(self.num_shards, self.seed, _EPOCH, epoch)


def seeded_permutation(length: int, *key: int) -> NDArray[np.intp]:
    """Permute `range(length)` by a key of non-negative integers.

    Sorts the raw output of PCG64, which numpy promises to keep for a `SeedSequence` (unlike
    `Generator.permutation`), so the order is the same on other versions and machines.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")


@lru_cache(maxsize=8)  # windows touch one or two epochs at a time, more when shards are few
def _cached_permutation(length: int, *key: int) -> NDArray[np.intp]:
    return seeded_permutation(length, *key)
