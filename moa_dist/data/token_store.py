"""Tokenizes text into files that an interrupted run continues.

A folder holds the tokens of all documents, end to end, a record per document, and `position.json`,
which says how far both are complete. Whoever continues cuts them to that length, reads the input
file in question again from its beginning, and tokenizes only pieces that were not. Reading is far
faster than tokenizing, and the counts of what was read come out as if nothing had happened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, Field

from moa_dist.data.hold_out import RECORD, Fingerprint, Records
from moa_dist.data.manifest import smallest_dtype, token_dtype
from moa_dist.data.spans import Span
from moa_dist.data.text import read_spans
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.errors import DataError

TOKENS_FILE = "tokens"
RECORDS_FILE = "documents"
POSITION_FILE = "position.json"
_BATCH_BYTES = 1 << 22
"""Text that is tokenized at once, by all cores. A token takes about 100 bytes meanwhile."""
_SAVE_BYTES = 1 << 26
"""Text after which the position is saved."""
_RECORDS_AT_ONCE = 1 << 16


class Position(BaseModel):
    """Says how much of a text the files hold."""

    tokens: int = 0
    """Tokens written."""
    documents: int = 0
    """Documents whose end is written."""
    tokens_of_documents: int = 0
    """Tokens of these; others belong to a document that goes on."""
    span: int = 0
    """Index of the span that was being read."""
    pieces: int = 0
    """Pieces of its text that were tokenized."""
    before_span: TextCounts = Field(default_factory=TextCounts)
    """Counts of what was read before that span."""
    counts: TextCounts | None = None
    """Counts of what was read, once everything is tokenized."""


def load_position(folder: Path) -> Position:
    """Return how much of a text a folder holds; the beginning if there is nothing yet."""
    try:
        return Position.model_validate_json((folder / POSITION_FILE).read_bytes())
    except FileNotFoundError:
        return Position()


def read_records(file: Path) -> Iterator[Records]:
    """Yield the records of all documents, some at a time."""
    with file.open("rb") as stream:
        while content := stream.read(_RECORDS_AT_ONCE * RECORD.itemsize):
            yield np.frombuffer(content, RECORD)


def write_durably(file: Path, content: str) -> None:
    """Write a file so that it is complete whenever it exists."""
    temporary = file.with_name(f"{file.name}.new")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def tokenize(
    spans: Sequence[Span],
    options: TextOptions,
    tokenizer: Tokenizer,
    seed: int,
    folder: Path,
    progress: Callable[[TextCounts], None],
) -> TextCounts:
    """Tokenize what the folder does not hold yet; return the counts of everything that was read.

    Args:
        spans: what to read.
        options: how to split and decode it.
        tokenizer: applied to every document.
        seed: seed of the documents' hashes.
        folder: where to write, or to continue.
        progress: called after each piece.

    Raises:
        DataError: the text cannot be read.
    """
    position = load_position(folder)
    if position.counts is not None:
        return position.counts
    counts = deepcopy(position.before_span)

    def opening(index: int) -> None:
        _number_bad_line(spans, options, counts)
        store.begin_span(index, counts)

    with TokenStore(folder, tokenizer, position) as store:
        documents = read_spans(spans, options, counts, first=position.span, opening=opening)
        try:
            for pieces in documents:
                store.add(_reported(pieces, counts, progress), Fingerprint(seed))
        except DataError:
            _raise_numbered(spans, options, counts)
            raise
        _number_bad_line(spans, options, counts)
        store.finish(counts)
    return counts


def _reported(
    pieces: Iterable[str], counts: TextCounts, progress: Callable[[TextCounts], None]
) -> Iterator[str]:
    for piece in pieces:
        yield piece
        progress(counts)


class _Waiting(NamedTuple):
    """Holds a piece of text to tokenize."""

    before: str
    """The character before it in its document."""
    text: str
    """The piece."""
    ends: Fingerprint | None
    """Of the whole document, if the piece is its last."""


class TokenStore:
    """Appends documents to the files of a folder; use as a context manager."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, position: Position | None = None
    ) -> None:
        self.position = position or Position()
        """What the files hold; the number of documents is final once `finish` was called."""
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = token_dtype(smallest_dtype(tokenizer.vocab_size))
        self._skipped = self.position.pieces
        self._tokens = _opened(folder / TOKENS_FILE, self.position.tokens * self._dtype.itemsize)
        self._records = _opened(folder / RECORDS_FILE, self.position.documents * RECORD.itemsize)
        # Where reading is, ahead of the position by the pieces that wait to be tokenized.
        self._span, self._before_span = self.position.span, self.position.before_span
        self._pieces = 0
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = self._unsaved_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tokens.close()
        self._records.close()

    def begin_span(self, index: int, counts: TextCounts) -> None:
        """Note that the documents from here on are those of another span."""
        self._span, self._before_span, self._pieces = index, deepcopy(counts), 0

    def add(self, pieces: Iterable[str], fingerprint: Fingerprint) -> None:
        """Append a document, given in pieces."""
        before, last, size = "", "", 0
        for number, piece in enumerate(pieces):
            if number:
                self._wait(_Waiting(before, last, None), size)
                before = last[-1:]
            last, size = piece, fingerprint.add(piece)
        self._wait(_Waiting(before, last, fingerprint), size)

    def finish(self, counts: TextCounts) -> None:
        """Write what is left, and that everything is tokenized."""
        self._encode_waiting()
        self.position.counts = counts
        self._save()

    def _wait(self, waiting: _Waiting, num_bytes: int) -> None:
        self._pieces += 1
        if self._skipped:
            self._skipped -= 1  # tokenized before an interruption
            return
        self._waiting.append(waiting)
        self._waiting_bytes += num_bytes
        if self._waiting_bytes >= _BATCH_BYTES:
            self._encode_waiting()

    def _encode_waiting(self) -> None:
        position = self.position
        encoded = self._tokenizer.encode_after([waiting[:2] for waiting in self._waiting])
        records = []
        for (_, ids), waiting in zip(encoded, self._waiting, strict=True):
            if waiting.ends:
                ids = [*ids, self._tokenizer.end_of_document]
            self._tokens.write(np.asarray(ids, self._dtype).tobytes())
            position.tokens += len(ids)
            if waiting.ends:
                num_tokens = position.tokens - position.tokens_of_documents
                records.append((num_tokens, waiting.ends.num_bytes, waiting.ends.digest))
                position.tokens_of_documents = position.tokens
        self._records.write(np.array(records, RECORD).tobytes())
        position.documents += len(records)
        position.span, position.pieces = self._span, self._pieces
        position.before_span = self._before_span
        self._unsaved_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0
        if self._unsaved_bytes >= _SAVE_BYTES:
            self._save()

    def _save(self) -> None:
        for file in (self._tokens, self._records):
            file.flush()
            os.fsync(file.fileno())
        write_durably(self._folder / POSITION_FILE, self.position.model_dump_json())
        self._unsaved_bytes = 0


def _opened(file: Path, size: int) -> BinaryIO:
    """Open a file to append to, cut to the size that is known to be complete."""
    stream = file.open("ab")
    stream.truncate(size)
    return stream


def _raise_numbered(spans: Sequence[Span], options: TextOptions, counts: TextCounts) -> None:
    """Raise the error again with lines counted from the beginning of the file, if they were not."""
    span = spans[counts.files_opened - 1] if counts.files_opened else None
    if span and span.start:
        for pieces in read_spans([span.with_first_line()], options, TextCounts()):
            for _ in pieces:
                pass


def _number_bad_line(spans: Sequence[Span], options: TextOptions, counts: TextCounts) -> None:
    """Count lines from the beginning of the file in the message about the first bad line."""
    if not counts.first_bad_line or counts.files_opened != 1 or not spans[0].start:
        return  # only the first span of a part may start inside of a file
    numbered = TextCounts()
    for pieces in read_spans([spans[0].with_first_line()], options, numbered):
        for _ in pieces:
            pass
        if numbered.first_bad_line:
            break
    counts.first_bad_line = numbered.first_bad_line
