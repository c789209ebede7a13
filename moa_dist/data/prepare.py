"""Turns text into shards: `text -> tokens -> shuffled, packed samples -> tar shards + manifest`.

Everything is written to a hidden folder next to the output and renamed at the very end, so an
interrupted run never leaves a folder that looks complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from moa_dist.data.hold_out import SPLITS, HoldOut, Split, Survey
from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.manifest import (
    Manifest,
    save_manifest,
    sha256_of,
    smallest_dtype,
)
from moa_dist.data.output_folder import check_output, partial_folder, put_in_place
from moa_dist.data.packing import TokenFile, write_shards
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.data.tokenizer import (
    DEFAULT_SAMPLE_BYTES,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)
from moa_dist.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, amount done, total)."""

DEFAULT_SAMPLES_PER_SHARD = 4096


@dataclass(frozen=True)
class Prepared:
    """Describes what `prepare` wrote."""

    manifests: dict[Path, Manifest]
    """The manifest of each folder of shards."""
    counts: TextCounts
    """Counts of the text that was read."""
    held_out: str | None
    """What the validation split holds, in words; None without one."""


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    block_length: int,
    vocab_size: int = 8000,
    tokenizer: Path | None = None,
    end_of_document: str | None = None,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    valid_share: float = 0.0,
    seed: int = 0,
    text: TextOptions | None = None,
    tokenizer_sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
    stdin: BinaryIO | None = None,
) -> Prepared:
    """Turn text into a folder of shards with a manifest and a tokenizer.

    The same inputs and options give byte-identical files.

    Args:
        inputs: files, folders, or `-` for stdin.
        output: folder to create. With a validation share it holds `train` and `valid`, each a
            separate folder of shards with the same tokenizer.
        block_length: tokens per sequence (L); a sample stores one more.
        vocab_size: size of the tokenizer that is trained when `tokenizer` is None.
        tokenizer: `tokenizer.json` to use instead, or a folder that holds one.
        end_of_document: token of `tokenizer` that ends documents; None to find it.
        samples_per_shard: maximum samples in a shard.
        valid_share: share of the text to hold out: whole documents, chosen by a hash of their
            text so that equal ones are never in both splits, or the end of the longest one if
            that leaves too little for a sample.
        seed: seed of the tokenizer's sample, of the held-out documents and of the document order.
        text: how files become documents; None for the defaults of `TextOptions`.
        tokenizer_sample_bytes: maximum text that a tokenizer is trained on.
        force: replace an output that an earlier run wrote.
        progress: called while working.
        stdin: stream to read the input `-` from; None for the process's stdin.

    Raises:
        DataError: the text cannot be read or is too short, an option is out of range, or the
            output exists.
    """
    options = text or TextOptions()
    _check_options(block_length, samples_per_shard, valid_share, seed, options.max_bytes)
    if end_of_document is not None and tokenizer is None:
        raise DataError(
            "--end-of-document names a token of a given tokenizer; give one with --tokenizer",
            key="--end-of-document",
        )
    check_output(output, force)
    with partial_folder(output) as partial:
        work = partial / "work"
        work.mkdir()
        left_out = LeftOut()
        files = find_files(inputs, stdin, work / "stdin", left_out)
        corpus = _Corpus(files, options, progress)
        used = None if tokenizer is None else load_tokenizer(tokenizer, end_of_document)
        hold_out = None
        if valid_share:
            survey = corpus.survey(Survey(valid_share, seed, block_length))
            hold_out = survey.share_of_documents(used) or survey.at_least_a_sample()
        if used is None:
            used = corpus.train_tokenizer(hold_out, vocab_size, tokenizer_sample_bytes, seed)
            if hold_out and not survey.fits(hold_out, used):
                hold_out = survey.at_least_a_sample()
                used = corpus.train_tokenizer(hold_out, vocab_size, tokenizer_sample_bytes, seed)
        counts = TextCounts(left_out=left_out)
        token_files = corpus.tokenize(used, hold_out, work, counts)
        manifests = {}
        for split, tokens in token_files.items():
            folder = partial / split
            folder.mkdir(exist_ok=True)
            manifests[output / split] = _write_split(
                tokens, folder, used, split, block_length, samples_per_shard, seed, progress
            )
        shutil.rmtree(work)
        put_in_place(partial, output)
    return Prepared(manifests, counts, hold_out.what if hold_out else None)


@dataclass(frozen=True)
class _Corpus:
    """Reads the text once to plan what is held out, once to train a tokenizer, and once more."""

    files: Sequence[Path]
    options: TextOptions
    progress: Progress

    def survey(self, survey: Survey) -> Survey:
        """Show all documents to the survey, and return it."""
        for pieces in self._documents("reading the text", TextCounts()):
            survey.add(pieces)
        return survey

    def train_tokenizer(
        self, hold_out: HoldOut | None, vocab_size: int, sample_bytes: int, seed: int
    ) -> Tokenizer:
        """Train a tokenizer on a sample of the text that is not held out."""
        parts = self._parts("sampling text for the tokenizer", hold_out, TextCounts())
        pieces = (piece for split, pieces in parts if split != "valid" for piece in pieces)
        sample = sample_text(pieces, sample_bytes, seed)
        self.progress("training the tokenizer", 0, 1)
        trained = train_tokenizer(sample, vocab_size)
        self.progress("training the tokenizer", 1, 1)
        return trained

    def tokenize(
        self, tokenizer: Tokenizer, hold_out: HoldOut | None, work: Path, counts: TextCounts
    ) -> dict[str, TokenFile]:
        """Write the token file of each split; the only split of undivided text is named "."."""
        with ExitStack() as stack:
            files: dict[str, TokenFile] = {
                split: stack.enter_context(TokenFile(work / f"tokens{number}", tokenizer))
                for number, split in enumerate(SPLITS if hold_out else (".",))
            }
            for split, pieces in self._parts("tokenizing", hold_out, counts):
                files[split].add(pieces)
        return files

    def _parts(
        self, what: str, hold_out: HoldOut | None, counts: TextCounts
    ) -> Iterator[tuple[Split | Literal["."], Iterator[str]]]:
        """Yield each document, or its two parts, with the split."""
        for number, pieces in enumerate(self._documents(what, counts)):
            if hold_out is None:
                yield ".", pieces
            else:
                yield from hold_out.parts(number, pieces)

    def _documents(self, what: str, counts: TextCounts) -> Iterator[Iterator[str]]:
        limit = self.options.max_bytes
        total = sum(file.stat().st_size for file in self.files) if limit is None else limit

        def reported(pieces: Iterator[str]) -> Iterator[str]:
            for piece in pieces:
                yield piece
                # The last call comes below, since several documents may end the text.
                done = counts.input_bytes if limit is None else counts.text_bytes
                self.progress(what, min(done, total - 1), total)

        for pieces in read_documents(self.files, self.options, counts):
            yield reported(pieces)
        self.progress(what, total, total)


def _write_split(
    tokens: TokenFile,
    folder: Path,
    tokenizer: Tokenizer,
    split: str,
    block_length: int,
    samples_per_shard: int,
    seed: int,
    progress: Progress,
) -> Manifest:
    name = "shards" if split == "." else f"{split} shards"
    try:
        packed = write_shards(
            tokens,
            folder,
            block_length=block_length,
            target=samples_per_shard,
            seed=seed,
            progress=lambda done, total: progress(f"writing {name}", done, total),
        )
    except DataError as error:
        if split == "valid":
            raise DataError(
                f"validation split: {error}, or a larger --valid-share", key="--valid-share"
            ) from error
        raise
    tokenizer_json = tokenizer.to_json().encode()
    (folder / TOKENIZER_FILE).write_bytes(tokenizer_json)
    manifest = Manifest(
        format_version=1,
        tokenizer_sha256=sha256_of(tokenizer_json),
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        block_length=block_length,
        dtype=smallest_dtype(tokenizer.vocab_size),
        samples_per_shard=packed.samples_per_shard,
        shards=packed.shards,
        documents=len(tokens.ends),
        tokens=tokens.num_tokens,
        text_bytes=tokens.text_bytes,
        dropped_tokens=packed.dropped_tokens,
        seed=seed,
    )
    save_manifest(manifest, folder)
    return manifest


def _check_options(
    block_length: int, samples_per_shard: int, valid_share: float, seed: int, max_bytes: int | None
) -> None:
    max_bytes_wrong = max_bytes is not None and max_bytes < 4
    checks = [
        (block_length < 1, "--sequence-length", block_length, "at least 1"),
        (samples_per_shard < 1, "--samples-per-shard", samples_per_shard, "at least 1"),
        (not 0 <= valid_share < 1, "--valid-share", valid_share, "from 0 to below 1"),
        (not 0 <= seed < 2**63, "--seed", seed, "from 0 to below 2^63"),
        (max_bytes_wrong, "--max-bytes", max_bytes, "at least 4"),
    ]
    problems = [
        DataError(f"{option} {value}: must be {allowed}", key=option)
        for wrong, option, value, allowed in checks
        if wrong
    ]
    if problems:
        raise DataError("; ".join(map(str, problems)), key=problems[0].key, causes=problems)
