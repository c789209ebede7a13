"""Pairs of a source text and its translation: shards of them, and their order in buckets.

A shard is a webdataset tar with two members per pair, `{pair:09d}.source` and `{pair:09d}.target`,
each the text's tokens as raw little-endian integers without the token that ends it. As parallel
text is small (the 4.5 M pairs of WMT14 take half a GB), every rank keeps all of it in memory.

A sample is a bucket: pairs of similar length, as many as make `bucket_tokens` with their padding.
Global sample g is bucket g mod N of epoch g // N, a pure function of (seed, lengths, g): pairs in
a fresh random order are sorted by length, cut into buckets, and the buckets shuffled. Where they
are cut depends on the lengths only, so all epochs have N. Rank g mod W takes it, as for samples of
text, so that the number of samples consumed is all the state there is.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import tar_file_iterator

from moa_dist.data.manifest import PairManifest, ShardEntry
from moa_dist.data.order import seeded_permutation
from moa_dist.data.shards import REMEDY, Tokens, check_ids, read_checked, write_members
from moa_dist.errors import DataError

_PAIRS, _BUCKETS = 3, 4  # tags that keep these permutations apart from those of `order`
_SIDES = ("source", "target")


def write_pairs(
    folder: Path, index: int, first: int, pairs: Iterable[tuple[Tokens, Tokens]]
) -> ShardEntry:
    """Write shard `index`, whose first pair is number `first`; returns its manifest entry."""
    named = (
        (member_name(first + row, side), tokens)
        for row, pair in enumerate(pairs)
        for side, tokens in zip(_SIDES, pair, strict=True)
    )
    return write_members(folder, index, named)


def member_name(pair: int, side: str) -> str:
    """Name of the member that holds one text of a pair, numbered over all shards."""
    return f"{pair:09d}.{side}"


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder, in file order."""

    tokens: Tokens
    """Of all texts, end to end: source, target, source, ..."""
    ends: NDArray[np.int64]
    """[N, 2]: where source and target of each pair end in `tokens`."""

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def longest(self) -> NDArray[np.int64]:
        """[N]: tokens of each pair's longer text, its end included."""
        lengths = np.diff(self.ends.ravel(), prepend=0).reshape(-1, 2)
        return lengths.max(1) + 1

    def source(self, pair: int) -> list[int]:
        """Tokens of its source text."""
        start = self.ends[pair - 1, 1] if pair else 0
        return self.tokens[start : self.ends[pair, 0]].tolist()

    def target(self, pair: int) -> list[int]:
        """Tokens of its target text."""
        return self.tokens[self.ends[pair, 0] : self.ends[pair, 1]].tolist()


def read_pairs(folder: Path, manifest: PairManifest) -> Pairs:
    """Read and check all shards of a folder.

    Raises:
        DataError: a shard is missing, differs from the manifest in any way, or holds a token
            id outside the vocabulary.
    """
    shards: list[Tokens] = []
    lengths: list[int] = []
    for index, entry in enumerate(manifest.shards):
        file, content = read_checked(folder, entry)
        first = index * manifest.pairs_per_shard
        count = min(manifest.pairs_per_shard, manifest.pairs - first)
        texts = _parse(file, content, manifest, range(first, first + count))
        # Shard by shard: an array per text takes many times the room of its tokens.
        lengths += map(len, texts)
        shards.append(np.concatenate(texts))
    ends = np.cumsum(lengths, dtype=np.int64).reshape(-1, 2)
    return Pairs(np.concatenate(shards), ends)


def _parse(file: Path, content: bytes, manifest: PairManifest, pairs: range) -> list[Tokens]:
    dtype, texts = manifest.numpy_dtype, []
    expected: Iterator[str] = (member_name(pair, side) for pair in pairs for side in _SIDES)
    try:
        for member in tar_file_iterator(io.BytesIO(content), skip_meta=None):
            wanted = next(expected, "the end")
            if member["fname"] != wanted:
                raise DataError(
                    f"{file}: member '{member['fname']}' where {wanted} should be; only texts of "
                    f"pairs in order are accepted; {REMEDY}"
                )
            size = len(member["data"])
            if not 0 < size < manifest.block_length * dtype.itemsize or size % dtype.itemsize:
                raise DataError(
                    f"{file}: member '{wanted}' has {size} bytes, no text of 1 to "
                    f"{manifest.block_length - 1} tokens; {REMEDY}"
                )
            texts.append(np.frombuffer(member["data"], dtype))
    except tarfile.TarError as error:
        raise DataError(f"{file}: not a tar archive ({error}); {REMEDY}") from error
    if len(texts) != 2 * len(pairs):
        raise DataError(f"{file}: {len(texts)} texts instead of {2 * len(pairs)}; {REMEDY}")
    check_ids(file, np.concatenate(texts), manifest.vocab_size)
    return texts


@dataclass(frozen=True, eq=False)
class BucketOrder:
    """Which pairs each bucket holds."""

    longest: NDArray[np.int64]
    """[N] tokens of each pair's longer text."""
    bucket_tokens: int
    """The most tokens of a bucket: pairs times the longest text. At least the longest text."""
    seed: int
    """Another seed gives another order."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where buckets begin among pairs sorted by length, longest first, and where all end."""
        lengths = np.sort(self.longest)[::-1]
        starts = [0]
        while starts[-1] < len(lengths):
            rows = self.bucket_tokens // int(lengths[starts[-1]])
            starts.append(min(starts[-1] + rows, len(lengths)))
        return np.array(starts)

    @property
    def num_buckets(self) -> int:
        """In every epoch."""
        return len(self.starts) - 1

    def take(self, samples: Iterable[int]) -> Iterator[NDArray[np.intp]]:
        """Pairs of each of the global samples, which may be any numbers from 0."""
        current = -1
        for sample in samples:
            epoch, place = divmod(sample, self.num_buckets)
            if epoch != current:
                current, (pairs, buckets) = epoch, self._epoch(epoch)
            yield self._cut(pairs, int(buckets[place]))

    def in_file_order(self) -> Iterator[NDArray[np.intp]]:
        """The buckets of pairs that nothing has shuffled, once."""
        pairs = np.argsort(-self.longest, kind="stable")
        for bucket in range(self.num_buckets):
            yield self._cut(pairs, bucket)

    def _cut(self, pairs: NDArray[np.intp], bucket: int) -> NDArray[np.intp]:
        return pairs[self.starts[bucket] : self.starts[bucket + 1]]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Pairs sorted by length, at random among equals, and the order of buckets."""
        pairs = seeded_permutation(len(self.longest), self.seed, _PAIRS, epoch)
        pairs = pairs[np.argsort(-self.longest[pairs], kind="stable")]
        return pairs, seeded_permutation(self.num_buckets, self.seed, _BUCKETS, epoch)
