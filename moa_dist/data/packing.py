"""Packs documents into shards, by way of a flat file of tokens.

Thanks to the flat file, documents are shuffled without holding the corpus in memory: it is written
in the order of the text and read back, memory-mapped, in shuffled order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moa_dist.data.manifest import ShardEntry, smallest_dtype, token_dtype
from moa_dist.data.order import seeded_permutation
from moa_dist.data.shards import Tokens, write_shard
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.errors import DataError

_BATCH_CHARACTERS = 1 << 22
_DOCUMENTS = 2  # tag that makes this permutation differ from those in `order`
_MIN_SHARDS = 16
_MIN_SAMPLES_PER_SHARD = 64


class TokenFile:
    """Stores the tokens of one split on disk, each document followed by the end token.

    Use as a context manager; `path`, `ends` and `text_bytes` remain valid after it is closed.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.path = path
        self.dtype = token_dtype(smallest_dtype(tokenizer.vocab_size))
        self.ends = array("q")
        """Offset in tokens at which each document ends."""
        self.text_bytes = 0
        self._tokenizer = tokenizer
        self._file = path.open("wb")
        # The character before a piece, the piece, whether it ends its document.
        self._waiting: list[tuple[str, str, bool]] = []
        self._waiting_characters = 0
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._encode_waiting()
        self._file.close()

    def add(self, pieces: Iterable[str]) -> None:
        """Append a document, given in pieces."""
        before, waiting = "", None
        for piece in pieces:
            self.text_bytes += len(piece.encode())
            if waiting is not None:
                self._wait(before, waiting, is_last=False)
                before = waiting[-1:]
            waiting = piece
        self._wait(before, waiting or "", is_last=True)

    def _wait(self, before: str, piece: str, *, is_last: bool) -> None:
        self._waiting.append((before, piece, is_last))
        self._waiting_characters += len(piece)
        if self._waiting_characters >= _BATCH_CHARACTERS:
            self._encode_waiting()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, end tokens included; final once the file is closed."""
        return self.ends[-1] if self.ends else 0

    def documents(self, seed: int) -> Iterator[Tokens]:
        """Yield the tokens of each document, in an order shuffled by `seed`."""
        tokens = np.memmap(self.path, self.dtype, mode="r")
        for index in seeded_permutation(len(self.ends), seed, _DOCUMENTS):
            start = self.ends[index - 1] if index else 0
            yield tokens[start : self.ends[index]]

    def _encode_waiting(self) -> None:
        encoded = self._tokenizer.encode_after([waiting[:2] for waiting in self._waiting])
        for (_, ids), (_, _, is_last) in zip(encoded, self._waiting, strict=True):
            if is_last:
                ids = [*ids, self._tokenizer.end_of_document]
            self._file.write(np.asarray(ids, self.dtype).tobytes())
            self._written += len(ids)
            if is_last:
                self.ends.append(self._written)
        self._waiting = []
        self._waiting_characters = 0


@dataclass(frozen=True)
class Packed:
    """Describes the shards that `write_shards` wrote."""

    shards: tuple[ShardEntry, ...]
    """One entry per file."""
    samples_per_shard: int
    """Samples in each shard."""
    dropped_tokens: int
    """Tokens left over after the last sample."""


def write_shards(
    tokens: TokenFile,
    folder: Path,
    *,
    block_length: int,
    target: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Packed:
    """Shuffle the documents, pack them end to end, and write equal shards.

    Args:
        tokens: the documents, in a closed file.
        folder: where to write the shards.
        block_length: L; samples have L + 1 tokens and overlap by one.
        target: maximum samples per shard. A small text gets smaller shards, so that several
            readers have enough of them.
        seed: seed that shuffles the documents.
        progress: called with (shards written, total shards).

    Raises:
        DataError: the text does not fill one sample.
    """
    num_samples = (tokens.num_tokens - 1) // block_length
    if num_samples < 1:
        raise DataError(
            f"too little text: {tokens.num_tokens} tokens in {len(tokens.ends)} documents, and one "
            f"sample of sequence length {block_length} takes {block_length + 1}; give more text "
            "or a smaller --sequence-length",
            key="--sequence-length",
        )
    num_shards = max(
        math.ceil(num_samples / target), min(_MIN_SHARDS, num_samples // _MIN_SAMPLES_PER_SHARD)
    )
    samples_per_shard = num_samples // num_shards
    runs = _overlapping_runs(tokens.documents(seed), samples_per_shard * block_length, tokens.dtype)
    shards = []
    for index, run in zip(range(num_shards), runs, strict=False):
        samples_SL = sliding_window_view(run, block_length + 1)[::block_length]
        shards.append(write_shard(folder, index, samples_SL))
        progress(index + 1, num_shards)
    used = num_shards * samples_per_shard * block_length + 1
    return Packed(tuple(shards), samples_per_shard, tokens.num_tokens - used)


def _overlapping_runs(
    documents: Iterator[Tokens], step: int, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[Tokens]:
    """Yield runs of `step + 1` tokens, each starting with the last token of the previous run."""
    run = np.empty(step + 1, dtype)
    filled = 0
    for document in documents:
        rest = document
        while len(rest):
            taken = min(len(rest), len(run) - filled)
            run[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == len(run):
                yield run
                run[0] = run[-1]
                filled = 1
