"""Decides which text is held out for validation, before the tokenizer is trained.

A hash of each document's text decides, so equal documents are never in both splits. If that leaves
a split without enough text for one sample, some more whole documents are held out; and if these
are too few or too long, as with a single large file, the end of the longest document is.

Documents are known by records of fixed size, which lie on disk, so memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moa_dist.errors import DataError

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])
"""What is known of a document: its tokens with the end token, UTF-8 bytes, and hash."""
Records = NDArray[np.void]
Mask = NDArray[np.bool_]

_BYTES_PER_TOKEN = 8
"""More than tokenizers need on average, so that text of this size is certainly enough."""
_MOST_CANDIDATES = 1000
"""Most documents that are held out beyond the share."""


class Fingerprint:
    """Measures and hashes one document."""

    def __init__(self, seed: int) -> None:
        self.num_bytes = 0
        """UTF-8 bytes so far."""
        self._hash = hashlib.blake2b(digest_size=8, key=str(seed).encode())

    def add(self, piece: str) -> int:
        """Add the next piece of the document; return its UTF-8 bytes."""
        encoded = piece.encode()
        self.num_bytes += len(encoded)
        self._hash.update(encoded)
        return len(encoded)

    @property
    def digest(self) -> int:
        """Return the hash, a number of 64 bits."""
        return int.from_bytes(self._hash.digest())


def most_tokens(pieces: Iterable[str], seed: int) -> tuple[int, int, int]:
    """Return the record of a document, with as many tokens as it can have in any tokenizer."""
    found = Fingerprint(seed)
    for piece in pieces:
        found.add(piece)
    return found.num_bytes + 1, found.num_bytes, found.digest  # a token has at least one byte


@dataclass
class SplitSize:
    """Measures one split of whole documents."""

    documents: int = 0
    """Number of documents."""
    num_bytes: int = 0
    """UTF-8 bytes."""
    tokens: int = 0
    """Tokens, end tokens included."""

    def add(self, records: Records) -> None:
        """Add documents."""
        self.documents += len(records)
        self.num_bytes += int(records["bytes"].sum())
        self.tokens += int(records["tokens"].sum())


@dataclass(frozen=True)
class HoldOut:
    """Assigns each document, or its end, to a split."""

    below: int
    """Documents whose hash is below this are held out."""
    what: str
    """What is held out, for the summary."""
    cut: tuple[int, int] | None = None
    """Bytes and hash of the document whose end is held out, and of those equal to it."""
    cut_at: int = 0
    """Byte after which the end begins, moved to a line end or a space if one is near."""

    def is_valid(self, records: Records) -> Mask:
        """Return which documents are held out as a whole."""
        return _below(records, self.below)

    def is_cut(self, records: Records) -> Mask:
        """Return of which documents the end is held out."""
        if self.cut is None:
            return np.zeros(len(records), bool)
        num_bytes, digest = self.cut
        return (records["bytes"] == num_bytes) & (records["digest"] == np.uint64(digest))

    def beginning(self, pieces: Iterator[str], end: list[str]) -> Iterator[str]:
        """Yield the pieces of a document before the cut; put the rest of the last one in `end`."""
        done = 0
        for piece in pieces:
            encoded = piece.encode()
            if done + len(encoded) <= self.cut_at:
                done += len(encoded)
                yield piece
                continue
            at = len(encoded[: self.cut_at - done].decode(errors="ignore"))
            # Moving the cut towards the beginning never leaves the end with too little text.
            near = max(at - 1000, at // 2)
            at = piece.rfind("\n", near, at) + 1 or piece.rfind(" ", near, at) + 1 or at
            end.append(piece[at:])
            yield piece[:at]
            return

    def parts(self, pieces: Iterator[str]) -> Iterator[Iterator[str]]:
        """Yield the beginning and the end of a document, to consume one after the other."""
        end: list[str] = []
        yield self.beginning(pieces, end)
        yield chain(end, pieces)


class Survey:
    """Plans what is held out from the records of all documents."""

    def __init__(self, share: float, block_length: int) -> None:
        self._share = share
        self._below = math.ceil(share * 2**64)
        self._needed = block_length + 1  # tokens of one sample
        self._enough = _BYTES_PER_TOKEN * self._needed
        self._sizes = {split: SplitSize() for split in SPLITS}
        self._longest = (0, 0)  # bytes and hash
        self._candidates = np.empty(0, RECORD)  # of training, those with the lowest hashes

    def add(self, records: Records) -> None:
        """Count the next documents, at least one."""
        is_valid = _below(records, self._below)
        train = records[~is_valid]
        self._sizes["valid"].add(records[is_valid])
        self._sizes["train"].add(train)
        longest = records[records["bytes"].argmax()]
        if longest["bytes"] > self._longest[0]:
            self._longest = (int(longest["bytes"]), int(longest["digest"]))
        candidates = np.concatenate([self._candidates, train])
        lowest = np.argsort(candidates["digest"], kind="stable")[:_MOST_CANDIDATES]
        self._candidates = candidates[lowest]

    def plan(self) -> HoldOut:
        """Return what to hold out.

        Raises:
            DataError: the text is too short for a sample in each split.
        """
        valid = self._sizes["valid"]
        if min(size.tokens for size in self._sizes.values()) >= self._needed:
            return HoldOut(self._below, f"{valid.documents:,} whole documents")
        return self._more_documents() or self._end_of_longest()

    def _more_documents(self) -> HoldOut | None:
        """Hold out documents in the order of their hashes, unless these are too long."""
        valid, train = (self._sizes[split].num_bytes for split in ("valid", "train"))
        documents, below = self._sizes["valid"].documents, self._below
        most = max(2 * self._share * (valid + train), 2 * self._enough)
        for record in self._candidates:
            num_bytes, digest = int(record["bytes"]), int(record["digest"])
            if valid >= self._enough and digest >= below:  # equal documents stay together
                break
            documents, below = documents + 1, digest + 1
            valid, train = valid + num_bytes, train - num_bytes
        if not self._enough <= valid <= most or train < self._enough:
            return None
        return HoldOut(below, f"{documents:,} whole documents")

    def _end_of_longest(self) -> HoldOut:
        num_bytes = sum(size.num_bytes for size in self._sizes.values())
        longest = self._longest[0]
        # A short document is halved.
        most = longest - min(self._enough, longest // 2)
        held_out = min(max(math.ceil(self._share * num_bytes), self._enough), most)
        if min(held_out, num_bytes - held_out) + 1 < self._needed:
            documents = sum(size.documents for size in self._sizes.values())
            raise DataError(
                f"too little text to hold out a part of it: {num_bytes:,} bytes in "
                f"{documents:,} documents, and one sample of sequence length "
                f"{self._needed - 1} takes {self._needed} tokens in each split; give more text, "
                "or a smaller --sequence-length",
                key="--sequence-length",
            )
        return HoldOut(
            0,
            "the end of the longest document, because whole documents would not fill a sample in "
            "each split",
            self._longest,
            longest - held_out,
        )


def _below(records: Records, bound: int) -> Mask:
    """Return which documents have a hash below a bound of at most 2^64."""
    digests: Any = records["digest"]
    return np.ones(len(records), bool) if bound >= 2**64 else digests < np.uint64(bound)
