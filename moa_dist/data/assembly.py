"""Makes shards of tokenized parts: holds text out, shuffles all documents, packs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moa_dist.data.hold_out import SPLITS, Fingerprint, HoldOut, Records, Survey
from moa_dist.data.manifest import Manifest, save_manifest, sha256_of, smallest_dtype
from moa_dist.data.packing import write_shards
from moa_dist.data.prepare_settings import Settings, stored_dtype
from moa_dist.data.shuffle import PLACE, Places, shuffled
from moa_dist.data.spans import Span
from moa_dist.data.text import read_spans
from moa_dist.data.text_options import TextCounts
from moa_dist.data.token_store import RECORDS_FILE, TOKENS_FILE, TokenStore, read_records
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer
from moa_dist.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, amount done, total)."""
WHOLE = "."
"""Name of the only split of text that is not divided."""


@dataclass(frozen=True)
class TokenizedPart:
    """Names a part of the text and its tokens."""

    folder: Path
    """Where its tokens and records are."""
    spans: Sequence[Span]
    """Where its text is."""

    def records(self) -> Iterator[Records]:
        """Yield the records of its documents, some at a time."""
        return read_records(self.folder / RECORDS_FILE)


def plan_hold_out(parts: Sequence[TokenizedPart], settings: Settings) -> HoldOut | None:
    """Return what is held out of tokenized text; None without a validation share.

    Raises:
        DataError: the text is too short for a sample in each split.
    """
    if not settings.valid_share:
        return None
    survey = Survey(settings.valid_share, settings.block_length)
    for part in parts:
        for records in part.records():
            survey.add(records)
    return survey.plan()


def write_output(
    parts: Sequence[TokenizedPart],
    hold_out: HoldOut | None,
    tokenizer: Tokenizer,
    settings: Settings,
    folder: Path,
    work: Path,
    progress: Progress,
) -> dict[str, Manifest]:
    """Write the folders of shards, and return their manifests by split.

    Args:
        parts: the text, in order.
        hold_out: what is held out of it.
        tokenizer: the tokenizer that was applied.
        settings: lengths and seed.
        folder: where to write; a split has a folder in it.
        work: folder for temporary files.
        progress: called while working.

    Raises:
        DataError: the text does not fill a sample, or the document to cut cannot be read again.
    """
    corpus = _TokenizedCorpus(parts, hold_out, tokenizer, settings, work)
    manifests = {}
    for split in SPLITS if hold_out else (WHOLE,):
        target = folder / split
        target.mkdir(parents=True, exist_ok=True)
        manifests[split] = corpus.write(split, target, progress)
    return manifests


@dataclass(frozen=True)
class _End:
    """Names the tokens of one side of a document that is cut."""

    file: int
    tokens: int
    num_bytes: int


class _TokenizedCorpus:
    """Chooses the documents of each split, and writes them."""

    def __init__(
        self,
        parts: Sequence[TokenizedPart],
        hold_out: HoldOut | None,
        tokenizer: Tokenizer,
        settings: Settings,
        work: Path,
    ) -> None:
        self._parts = parts
        self._hold_out = hold_out
        self._tokenizer = tokenizer
        self._settings = settings
        self._work = work
        self._files = [part.folder / TOKENS_FILE for part in parts]
        self._cut = self._cut_document() if hold_out and hold_out.cut else {}

    def write(self, split: str, folder: Path, progress: Progress) -> Manifest:
        """Write the shards, tokenizer and manifest of a split."""
        documents = tokens = text_bytes = 0
        for places, num_bytes in self._chosen(split):
            documents += len(places)
            tokens += int(places["tokens"].sum())
            text_bytes += num_bytes
        settings, dtype = self._settings, stored_dtype(self._tokenizer)
        name = "shards" if split == WHOLE else f"{split} shards"
        try:
            packed = write_shards(
                shuffled(
                    (places for places, _ in self._chosen(split)),
                    self._files,
                    dtype,
                    settings.seed,
                    self._work,
                    num_documents=documents,
                    num_tokens=tokens,
                ),
                dtype,
                folder,
                num_documents=documents,
                num_tokens=tokens,
                block_length=settings.block_length,
                target=settings.samples_per_shard,
                progress=lambda done, total: progress(f"writing {name}", done, total),
            )
        except DataError as error:
            if split == "valid":
                raise DataError(
                    f"validation split: {error}, or a larger --valid-share", key="--valid-share"
                ) from error
            raise
        tokenizer_json = self._tokenizer.to_json().encode()
        (folder / TOKENIZER_FILE).write_bytes(tokenizer_json)
        manifest = Manifest(
            format_version=1,
            tokenizer_sha256=sha256_of(tokenizer_json),
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            block_length=settings.block_length,
            dtype=smallest_dtype(self._tokenizer.vocab_size),
            samples_per_shard=packed.samples_per_shard,
            shards=packed.shards,
            documents=documents,
            tokens=tokens,
            text_bytes=text_bytes,
            dropped_tokens=packed.dropped_tokens,
            seed=settings.seed,
        )
        save_manifest(manifest, folder)
        return manifest

    def _chosen(self, split: str) -> Iterator[tuple[Places, int]]:
        """Yield where the documents of a split are, some at a time, with their UTF-8 bytes."""
        for file, part in enumerate(self._parts):
            start = 0
            for records in part.records():
                places = np.empty(len(records), PLACE)
                ends = start + np.cumsum(records["tokens"])
                places["file"], places["tokens"] = file, records["tokens"]
                places["start"] = ends - records["tokens"]
                start, num_bytes = int(ends[-1]), records["bytes"].copy()
                if self._hold_out:
                    is_valid, is_cut = (
                        of(records) for of in (self._hold_out.is_valid, self._hold_out.is_cut)
                    )
                    if side := self._cut.get(split):
                        places[is_cut] = (side.file, 0, side.tokens)
                        num_bytes[is_cut] = side.num_bytes
                    chosen = is_valid | is_cut if split == "valid" else ~is_valid
                    places, num_bytes = places[chosen], num_bytes[chosen]
                yield places, int(num_bytes.sum())

    def _cut_document(self) -> dict[str, _End]:
        """Tokenize the two sides of the document whose end is held out."""
        assert self._hold_out is not None
        part, index = self._find_cut(self._hold_out)
        text = read_spans(part.spans, self._settings.text, TextCounts())
        pieces = next(islice(text, index, None), iter(()))
        whole = Fingerprint(self._settings.seed)
        sides: dict[str, _End] = {}
        parts = self._hold_out.parts(_seen(pieces, whole))
        for split, side in zip(SPLITS, parts, strict=True):
            folder = self._work / f"cut-{split}"
            folder.mkdir(exist_ok=True)
            found = Fingerprint(self._settings.seed)
            with TokenStore(folder, self._tokenizer) as store:
                store.add(side, found)
                store.finish(TextCounts())
            sides[split] = _End(len(self._files), store.position.tokens, found.num_bytes)
            self._files.append(folder / TOKENS_FILE)
        if (whole.num_bytes, whole.digest) != self._hold_out.cut:
            raise DataError(
                "the longest document is no longer what it was when it was tokenized; run "
                "moa-dist prepare on the whole text again",
                key="--input",
            )
        return sides

    def _find_cut(self, hold_out: HoldOut) -> tuple[TokenizedPart, int]:
        for part in self._parts:
            index = 0
            for records in part.records():
                found = np.flatnonzero(hold_out.is_cut(records))
                if len(found):
                    return part, index + int(found[0])
                index += len(records)
        raise AssertionError("the plan was made from these records")


def _seen(pieces: Iterator[str], whole: Fingerprint) -> Iterator[str]:
    for piece in pieces:
        whole.add(piece)
        yield piece
