"""Reads the text of one process: to plan what is held out, to train a tokenizer, to tokenize it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from moa_dist.data.assembly import Progress
from moa_dist.data.hold_out import RECORD, HoldOut, Survey, most_tokens
from moa_dist.data.prepare_settings import Settings
from moa_dist.data.spans import Span
from moa_dist.data.text import check_any_text, read_spans
from moa_dist.data.text_options import TextCounts
from moa_dist.data.token_store import (
    POSITION_FILE,
    read_records,
    tokenize,
    write_durably,
)
from moa_dist.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)

_SURVEY_FILE = "survey"
_PLAN_FILE = "hold-out.json"
_RECORDS_AT_ONCE = 1 << 14


class TrainedOn(BaseModel):
    """Says what was held out of the text that a tokenizer was trained on."""

    hold_out: HoldOut | None
    """What was held out."""
    is_final: bool
    """Whether it stays so, however many tokens the text turns out to have."""


class Corpus:
    """Reads spans of text, and keeps what it makes of them in a folder, for the next run."""

    def __init__(
        self, spans: Sequence[Span], settings: Settings, folder: Path, progress: Progress
    ) -> None:
        self._spans = spans
        self._settings = settings
        self._folder = folder
        self._progress = progress

    def trained_tokenizer(self) -> tuple[Tokenizer, TrainedOn]:
        """Return the tokenizer that the folder holds, or else train it.

        What is held out is planned before there are tokens, as if each token were one byte.

        Raises:
            DataError: the text cannot be read, or is too short to hold out a part of it.
        """
        if not (self._folder / TOKENIZER_FILE).exists():
            hold_out = self._survey() if self._settings.valid_share else None
            self._train(TrainedOn(hold_out=hold_out, is_final=False))
        plan = TrainedOn.model_validate_json((self._folder / _PLAN_FILE).read_bytes())
        return load_tokenizer(self._folder), plan

    def trained_again(self, hold_out: HoldOut) -> Tokenizer:
        """Train the tokenizer without other text, because a split had too few tokens."""
        for name in (TOKENIZER_FILE, POSITION_FILE):
            (self._folder / name).unlink()
        self._train(TrainedOn(hold_out=hold_out, is_final=True))
        return load_tokenizer(self._folder)

    def tokenize(self, tokenizer: Tokenizer) -> TextCounts:
        """Write the tokens of all documents into the folder, or as many as are missing."""
        settings = self._settings
        show, total = self._shown("tokenizing")
        counts = tokenize(self._spans, settings.text, tokenizer, settings.seed, self._folder, show)
        self._progress("tokenizing", total, total)
        return counts

    def _survey(self) -> HoldOut:
        """Plan what is held out, and keep the records of all documents."""
        survey = Survey(self._settings.valid_share, self._settings.block_length)
        waiting: list[tuple[int, int, int]] = []
        with (self._folder / _SURVEY_FILE).open("wb") as out:

            def flush() -> None:
                records = np.array(waiting, RECORD)
                survey.add(records)
                out.write(records.tobytes())
                waiting.clear()

            for pieces in self._documents("reading the text"):
                waiting.append(most_tokens(pieces, self._settings.seed))
                if len(waiting) == _RECORDS_AT_ONCE:
                    flush()
            if waiting:
                flush()
        return survey.plan()

    def _train(self, plan: TrainedOn) -> None:
        """Train a tokenizer on a sample of the text that is not held out."""
        sample_bytes, vocab_size = self._settings.tokenizer_sample_bytes, self._settings.vocab_size
        assert sample_bytes is not None
        assert vocab_size is not None
        pieces = self._training_pieces(plan.hold_out)
        sample = sample_text(pieces, sample_bytes, self._settings.seed)
        self._progress("training the tokenizer", 0, 1)
        trained = train_tokenizer(sample, vocab_size)
        self._progress("training the tokenizer", 1, 1)
        write_durably(self._folder / _PLAN_FILE, plan.model_dump_json())
        write_durably(self._folder / TOKENIZER_FILE, trained.to_json())

    def _training_pieces(self, hold_out: HoldOut | None) -> Iterator[str]:
        documents = self._documents("sampling text for the tokenizer")
        if hold_out is None:
            for pieces in documents:
                yield from pieces
            return
        for pieces, (is_valid, is_cut) in zip(documents, self._sides(hold_out), strict=True):
            if is_cut:
                yield from next(hold_out.parts(pieces))
            elif not is_valid:
                yield from pieces

    def _sides(self, hold_out: HoldOut) -> Iterator[Any]:
        """Yield for each document whether it is held out, and whether its end is."""
        for records in read_records(self._folder / _SURVEY_FILE):
            sides = np.stack([hold_out.is_valid(records), hold_out.is_cut(records)], axis=1)
            yield from sides.tolist()

    def _documents(self, what: str) -> Iterator[Iterator[str]]:
        show, total = self._shown(what)
        counts = TextCounts()

        def reported(pieces: Iterator[str]) -> Iterator[str]:
            for piece in pieces:
                yield piece
                show(counts)

        for pieces in read_spans(self._spans, self._settings.text, counts):
            yield reported(pieces)
        check_any_text(len(self._spans), counts)
        self._progress(what, total, total)

    def _shown(self, what: str) -> tuple[Callable[[TextCounts], None], int]:
        """Return a function that shows how much was read, and the total."""
        limit = self._settings.text.max_bytes
        total = sum(span.size for span in self._spans) if limit is None else limit

        def show(counts: TextCounts) -> None:
            # The last call comes later, since several documents may end the text.
            done = counts.input_bytes if limit is None else counts.text_bytes
            self._progress(what, max(min(done, total - 1), 0), total)

        return show, total
