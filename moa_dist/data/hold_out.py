"""Decides which text is held out for validation, before the tokenizer is trained.

A hash of each document's text decides, so equal documents are never in both splits. If that leaves
a split without enough text for one sample, some more whole documents are held out; and if these
are too few or too long, as with a single large file, the end of the longest document is.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from moa_dist.data.tokenizer import Tokenizer
from moa_dist.errors import DataError

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
_BYTES_PER_TOKEN = 8
"""More than tokenizers need on average, so that text of this size is certainly enough."""
_MOST_CANDIDATES = 1000
"""Most documents that are held out beyond the share."""


@dataclass
class SplitSize:
    """Measures one split of whole documents."""

    documents: int = 0
    """Number of documents."""
    num_bytes: int = 0
    """UTF-8 bytes."""
    pieces: list[str] = field(default_factory=list)
    """The text, if it is so short that its tokens must be counted."""

    def add(self, num_bytes: int, pieces: list[str], enough: int) -> None:
        """Add a document of `num_bytes`; from `enough` bytes on, its pieces are not kept."""
        self.documents += 1
        self.num_bytes += num_bytes
        if self.num_bytes < enough:
            self.pieces += pieces
        else:
            self.pieces = []


@dataclass(frozen=True)
class HoldOut:
    """Assigns each document, or its end, to a split."""

    of_document: bytes
    """For each document, the index in `SPLITS` of its split."""
    what: str
    """What is held out, for the summary."""
    cut: frozenset[int] = frozenset()
    """Documents whose end is held out; several only if they are equal."""
    cut_at: int = 0
    """Byte after which the end begins, moved to a line end or a space if one is near."""

    def parts(self, number: int, pieces: Iterator[str]) -> Iterator[tuple[Split, Iterator[str]]]:
        """Yield the parts of document `number` with their splits, to consume one after another."""
        if number not in self.cut:
            yield SPLITS[self.of_document[number]], pieces
            return
        end: list[str] = []
        yield "train", self._beginning(pieces, end)
        yield "valid", chain(end, pieces)

    def _beginning(self, pieces: Iterator[str], end: list[str]) -> Iterator[str]:
        """Yield the pieces before the cut, and put what remains of the last one in `end`."""
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


class Survey:
    """Reads all documents once to plan what is held out."""

    def __init__(self, share: float, seed: int, block_length: int) -> None:
        self._share = share
        self._needed = block_length + 1  # tokens of one sample
        self._enough = _BYTES_PER_TOKEN * self._needed
        self._key = str(seed).encode()
        self._sizes = {split: SplitSize() for split in SPLITS}
        self._of_document = bytearray()
        self._longest = (0, 0)  # bytes and digest
        self._equal: set[int] = set()  # the longest document, and those equal to it
        # A heap of (negated digest, document, bytes) with the lowest digests in training.
        self._candidates: list[tuple[int, int, int]] = []

    def add(self, pieces: Iterable[str]) -> None:
        """Measure the next document."""
        hashed = hashlib.blake2b(digest_size=8, key=self._key)
        num_bytes, short = 0, []
        for piece in pieces:
            encoded = piece.encode()
            hashed.update(encoded)
            num_bytes += len(encoded)
            if num_bytes < self._enough:
                short.append(piece)
        number, digest = len(self._of_document), int.from_bytes(hashed.digest())
        is_valid = digest < self._share * 2**64
        self._of_document.append(is_valid)
        self._sizes[SPLITS[is_valid]].add(num_bytes, short, self._enough)
        if not is_valid:
            heapq.heappush(self._candidates, (-digest, number, num_bytes))
            if len(self._candidates) > _MOST_CANDIDATES:
                heapq.heappop(self._candidates)
        if (num_bytes, digest) == self._longest:
            self._equal.add(number)
        elif num_bytes > self._longest[0]:
            self._longest, self._equal = (num_bytes, digest), {number}

    def share_of_documents(self, tokenizer: Tokenizer | None) -> HoldOut | None:
        """Return the plan that holds out the share; None if a split would be too small.

        Without a tokenizer, returns the plan unless it is too small with any.
        """
        for size in self._sizes.values():
            tokens = size.num_bytes + size.documents  # a token has at least one byte
            if tokenizer and size.num_bytes < self._enough:
                tokens = sum(map(len, tokenizer.encode_batch(size.pieces))) + size.documents
            if tokens < self._needed:
                return None
        return self._whole(self._of_document)

    def fits(self, plan: HoldOut, tokenizer: Tokenizer) -> bool:
        """Return whether a plan made without the tokenizer leaves each split enough tokens."""
        planned = plan.of_document == self._of_document and not plan.cut
        return not planned or self.share_of_documents(tokenizer) is not None

    def at_least_a_sample(self) -> HoldOut:
        """Return the plan that holds out more than the share of whole documents.

        Raises:
            DataError: the text is too short for a sample in each split.
        """
        return self._more_documents() or self._end_of_longest()

    def _more_documents(self) -> HoldOut | None:
        """Hold out documents in the order of their hashes, unless these are too long."""
        valid, train = (self._sizes[split].num_bytes for split in ("valid", "train"))
        most = max(2 * self._share * (valid + train), 2 * self._enough)
        chosen, last = bytearray(self._of_document), None
        for negated, number, num_bytes in sorted(self._candidates, reverse=True):
            if valid >= self._enough and negated != last:  # equal documents stay together
                break
            chosen[number], last = 1, negated
            valid, train = valid + num_bytes, train - num_bytes
        if not self._enough <= valid <= most or train < self._enough:
            return None
        return self._whole(chosen)

    def _whole(self, of_document: bytearray) -> HoldOut:
        return HoldOut(bytes(of_document), f"{sum(of_document):,} whole documents")

    def _end_of_longest(self) -> HoldOut:
        num_bytes = sum(size.num_bytes for size in self._sizes.values())
        longest = self._longest[0]
        # A short document is halved.
        most = longest - min(self._enough, longest // 2)
        held_out = min(max(math.ceil(self._share * num_bytes), self._enough), most)
        if min(held_out, num_bytes - held_out) + 1 < self._needed:
            raise DataError(
                f"too little text to hold out a part of it: {num_bytes:,} bytes in "
                f"{len(self._of_document):,} documents, and one sample of sequence length "
                f"{self._needed - 1} takes {self._needed} tokens in each split; give more text, "
                "or a smaller --sequence-length",
                key="--sequence-length",
            )
        return HoldOut(
            bytes(len(self._of_document)),
            "the end of the longest document, because whole documents would not fill a sample in "
            "each split",
            frozenset(self._equal),
            longest - held_out,
        )
