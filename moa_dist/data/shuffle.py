"""Shuffles documents on disk, in bounded memory, in an order that no division changes.

Document d of all has a random key that depends on the seed and d alone, and the order is that of
the keys. So documents are sorted as any file that exceeds memory is: dealt into buckets by key,
and each bucket sorted by itself. Very long documents are not copied, but read where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moa_dist.data.shards import Tokens

PLACE = np.dtype([("file", "<i4"), ("start", "<i8"), ("tokens", "<i8")])
"""Where the tokens of a document are: the index of a file, offset and number in tokens."""
Places = NDArray[np.void]

_ENTRY = np.dtype(
    [("key", "<u8"), ("number", "<i8"), ("file", "<i4"), ("start", "<i8"), ("tokens", "<i8")]
)
_IN_BUCKET = -1  # file of an entry whose tokens are in the bucket itself
_DOCUMENTS = 2  # tag that makes this permutation differ from those in `order`
_BUCKET_BYTES = 1 << 26
_TOKENS_AT_ONCE = 1 << 20


def shuffled(
    places: Iterable[Places],
    files: Sequence[Path],
    dtype: np.dtype[np.unsignedinteger],
    seed: int,
    work: Path,
    *,
    num_documents: int,
    num_tokens: int,
) -> Iterator[Tokens]:
    """Yield the tokens of all documents in an order shuffled by `seed`, in runs of any length.

    Args:
        places: where the documents are, in their order.
        files: the files that hold them.
        dtype: type of the tokens.
        seed: seed of the order, as `seeded_permutation(num_documents, seed, 2)` gives it.
        work: folder for the buckets, emptied on the way.
        num_documents: number of all documents.
        num_tokens: number of all tokens.
    """
    num_bytes = num_tokens * dtype.itemsize + num_documents * _ENTRY.itemsize
    buckets = _Buckets(work, dtype, -(-num_bytes // _BUCKET_BYTES))
    keys = np.random.PCG64(np.random.SeedSequence((seed, _DOCUMENTS)))
    number = 0
    for some in places:
        entries = np.empty(len(some), _ENTRY)
        entries["key"] = keys.random_raw(len(some))
        entries["number"] = np.arange(number, number + len(some))
        for name in ("file", "start", "tokens"):
            entries[name] = some[name]
        buckets.deal(entries, files)
        number += len(some)
    for index in range(buckets.number):
        yield from buckets.take(index, files)


class _Buckets:
    """Deals documents into files by key, and takes them out in order."""

    def __init__(self, work: Path, dtype: np.dtype[np.unsignedinteger], number: int) -> None:
        self.number = number
        """Number of buckets."""
        self._work = work
        self._dtype = dtype
        self._filled = np.zeros(number, np.int64)  # tokens in each bucket
        for index in range(number):
            for file in self._files(index):
                file.unlink(missing_ok=True)  # of a run that was interrupted

    def deal(self, entries: NDArray[np.void], files: Sequence[Path]) -> None:
        """Append documents to their buckets."""
        is_long = entries["tokens"] > _TOKENS_AT_ONCE
        self._append(entries[is_long], np.empty(0, self._dtype))
        short = entries[~is_long]
        for group in _regions(short):
            first, last = group[0], group[-1]
            length = int(last["start"] + last["tokens"] - first["start"])
            tokens = _read(files[first["file"]], self._dtype, int(first["start"]), length)
            order = np.argsort(self._bucket(group), kind="stable")
            group, offset = group[order], first["start"]
            tokens = _gather(tokens, group["start"] - offset, group["tokens"])
            group["file"] = _IN_BUCKET
            self._append(group, tokens)

    def take(self, index: int, files: Sequence[Path]) -> Iterator[Tokens]:
        """Yield the tokens of a bucket's documents in order, and delete it."""
        entries_file, tokens_file = self._files(index)
        if not entries_file.exists():
            return
        entries = np.fromfile(entries_file, _ENTRY)
        tokens = np.fromfile(tokens_file, self._dtype)
        entries = entries[np.lexsort((entries["number"], entries["key"]))]
        first = 0
        for at in [*np.flatnonzero(entries["file"] != _IN_BUCKET), len(entries)]:
            for group in _at_most(entries[first:at]):
                yield _gather(tokens, group["start"], group["tokens"])
            if at < len(entries):
                yield from self._blocks(entries[at], files)
            first = at + 1
        entries_file.unlink()
        tokens_file.unlink()

    def _blocks(self, entry: np.void, files: Sequence[Path]) -> Iterator[Tokens]:
        start, end = int(entry["start"]), int(entry["start"] + entry["tokens"])
        for at in range(start, end, _TOKENS_AT_ONCE):
            length = min(_TOKENS_AT_ONCE, end - at)
            yield _read(files[entry["file"]], self._dtype, at, length)

    def _bucket(self, entries: NDArray[np.void]) -> NDArray[np.uint64]:
        """Return the bucket of each document, which never falls as the key grows."""
        return (entries["key"] >> np.uint64(32)) * np.uint64(self.number) >> np.uint64(32)

    def _append(self, entries: NDArray[np.void], tokens: Tokens) -> None:
        """Append documents, sorted by bucket, with their tokens, unless these stay elsewhere."""
        if not len(entries):
            return
        entries = entries[np.argsort(self._bucket(entries), kind="stable")]
        numbers, firsts = np.unique(self._bucket(entries), return_index=True)
        held = np.where(entries["file"] == _IN_BUCKET, entries["tokens"], 0)
        ends = np.concatenate([[0], np.cumsum(held)])
        for index, first, until in zip(numbers, firsts, [*firsts[1:], len(entries)], strict=True):
            some = entries[first:until]
            if some["file"][0] == _IN_BUCKET:
                some["start"] = self._filled[index] + ends[first:until] - ends[first]
            self._filled[index] += ends[until] - ends[first]
            contents = (some, tokens[ends[first] : ends[until]])
            for file, content in zip(self._files(int(index)), contents, strict=True):
                with file.open("ab") as out:
                    out.write(content.tobytes())

    def _files(self, index: int) -> tuple[Path, Path]:
        return self._work / f"bucket-{index}", self._work / f"bucket-{index}.tokens"


def _regions(entries: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
    """Split documents into groups that lie in a region of bounded size of one file."""
    borders = np.flatnonzero(np.diff(entries["file"])) + 1
    for of_file in np.split(entries, borders):
        first, ends = 0, of_file["start"] + of_file["tokens"]
        while first < len(of_file):
            bound = of_file["start"][first] + 2 * _TOKENS_AT_ONCE
            until = int(np.searchsorted(ends, bound, side="right"))
            yield of_file[first:until]
            first = until


def _at_most(entries: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
    """Split documents into groups of at most twice `_TOKENS_AT_ONCE` tokens."""
    if len(entries):
        groups = np.cumsum(entries["tokens"]) // _TOKENS_AT_ONCE
        yield from np.split(entries, np.flatnonzero(np.diff(groups)) + 1)


def _gather(tokens: Tokens, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tokens:
    """Return documents, given by where they start and how long they are, one after the other."""
    ends = np.cumsum(lengths)
    return tokens[np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])]


def _read(file: Path, dtype: np.dtype[np.unsignedinteger], start: int, length: int) -> Tokens:
    return np.fromfile(file, dtype, length, offset=start * dtype.itemsize)
