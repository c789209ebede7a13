"""Stores pairs of a source text and its translation in shards, and orders them in buckets.

A shard is a webdataset tar with two members per pair, `{pair:09d}.source` and `{pair:09d}.target`,
each holding the text's tokens as raw little-endian integers without the end token. Parallel text
is small (the 4.5 M pairs of WMT14 take half a GB), so every rank keeps all of it in memory.

A sample is a bucket: as many pairs of similar length as fit `bucket_tokens` with their padding.
Global sample g is bucket g mod N of epoch g // N, a pure function of (seed, lengths, g): pairs in
a fresh random order are sorted by length, cut into buckets, and the buckets shuffled. The cuts
depend only on the lengths, so every epoch has N buckets. As with samples of text, rank g mod W
takes sample g, and the number of samples consumed is the only state.
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

_PAIRS, _BUCKETS = 3, 4  # tags that make these permutations differ from those in `order`
_SIDES = ("source", "target")


def write_pairs(
    folder: Path, index: int, first: int, pairs: Iterable[tuple[Tokens, Tokens]]
) -> ShardEntry:
    """Write shard `index`, whose first pair is number `first`; return its manifest entry."""
    named = (
        (member_name(first + row, side), tokens)
        for row, pair in enumerate(pairs)
        for side, tokens in zip(_SIDES, pair, strict=True)
    )
    return write_members(folder, index, named)


def member_name(pair: int, side: str) -> str:
    """Return the name of the member that holds one text of a pair, numbered over all shards."""
    return f"{pair:09d}.{side}"


@dataclass(frozen=True)
class Pairs:
    """Holds all pairs of a folder in memory, in file order."""

    tokens: Tokens
    """Tokens of all texts, concatenated: source, target, source, ..."""
    ends: NDArray[np.int64]
    """[N, 2]: offsets in `tokens` at which source and target of each pair end."""

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def longest(self) -> NDArray[np.int64]:
        """Return the length of each pair's longer text, end token included, [N]."""
        lengths = np.diff(self.ends.ravel(), prepend=0).reshape(-1, 2)
        return lengths.max(1) + 1

    def source(self, pair: int) -> list[int]:
        """Return the tokens of a pair's source text."""
        start = self.ends[pair - 1, 1] if pair else 0
        return self.tokens[start : self.ends[pair, 0]].tolist()

    def target(self, pair: int) -> list[int]:
        """Return the tokens of a pair's target text."""
        return self.tokens[self.ends[pair, 0] : self.ends[pair, 1]].tolist()


def read_pairs(folder: Path, manifest: PairManifest) -> Pairs:
    """Read and check all shards of a folder.

    Raises:
        DataError: a shard is missing or differs from the manifest in any way, or holds a token
            id outside the vocabulary.
    """
    shards: list[Tokens] = []
    lengths: list[int] = []
    for index, entry in enumerate(manifest.shards):
        file, content = read_checked(folder, entry)
        first = index * manifest.pairs_per_shard
        count = min(manifest.pairs_per_shard, manifest.pairs - first)
        texts = _parse(file, content, manifest, range(first, first + count))
        # Shard by shard: an array per text takes many times the memory of its tokens.
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
                    f"pairs in order are accepted; {REMEDY}",
                    path=file,
                    key=member["fname"],
                )
            size = len(member["data"])
            if not 0 < size < manifest.block_length * dtype.itemsize or size % dtype.itemsize:
                raise DataError(
                    f"{file}: member '{wanted}' has {size} bytes, not a text of 1 to "
                    f"{manifest.block_length - 1} tokens; {REMEDY}",
                    path=file,
                    key=wanted,
                )
            texts.append(np.frombuffer(member["data"], dtype))
    except tarfile.TarError as error:
        raise DataError(f"{file}: not a tar archive ({error}); {REMEDY}", path=file) from error
    if len(texts) != 2 * len(pairs):
        raise DataError(
            f"{file}: {len(texts)} texts instead of {2 * len(pairs)}; {REMEDY}",
            path=file,
            key="pairs_per_shard",
        )
    check_ids(file, np.concatenate(texts), manifest.vocab_size)
    return texts


@dataclass(frozen=True, eq=False)
class BucketOrder:
    """Maps each global sample to the pairs in its bucket."""

    longest: NDArray[np.int64]
    """[N] length of each pair's longer text."""
    bucket_tokens: int
    """Maximum tokens in a bucket, pairs times longest text. No text is longer than this."""
    seed: int
    """Seed of all permutations."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Return where buckets start among pairs sorted longest first, and where the last ends."""
        lengths = np.sort(self.longest)[::-1]
        starts = [0]
        while starts[-1] < len(lengths):
            rows = self.bucket_tokens // int(lengths[starts[-1]])
            starts.append(min(starts[-1] + rows, len(lengths)))
        return np.array(starts)

    @property
    def num_buckets(self) -> int:
        """Return the number of buckets in every epoch."""
        return len(self.starts) - 1

    def take(self, samples: Iterable[int]) -> Iterator[NDArray[np.intp]]:
        """Yield the pairs of each global sample; samples may be any numbers from 0."""
        current = -1
        for sample in samples:
            epoch, place = divmod(sample, self.num_buckets)
            if epoch != current:
                current, (pairs, buckets) = epoch, self._epoch(epoch)
            yield self._cut(pairs, int(buckets[place]))

    def in_file_order(self) -> Iterator[NDArray[np.intp]]:
        """Yield each bucket of the unshuffled pairs once."""
        pairs = np.argsort(-self.longest, kind="stable")
        for bucket in range(self.num_buckets):
            yield self._cut(pairs, bucket)

    def _cut(self, pairs: NDArray[np.intp], bucket: int) -> NDArray[np.intp]:
        return pairs[self.starts[bucket] : self.starts[bucket + 1]]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return pairs sorted by length, randomly among equals, and the order of buckets."""
        pairs = seeded_permutation(len(self.longest), self.seed, _PAIRS, epoch)
        pairs = pairs[np.argsort(-self.longest[pairs], kind="stable")]
        return pairs, seeded_permutation(self.num_buckets, self.seed, _BUCKETS, epoch)
