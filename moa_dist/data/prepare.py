"""Turns text into shards: `text -> tokens -> shuffled, packed samples -> tar shards + manifest`.

Everything is written to a hidden folder next to the output and renamed at the very end, so an
interrupted run never leaves a folder that looks complete. The same command continues it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moa_dist.data.assembly import (
    Progress,
    TokenizedPart,
    plan_hold_out,
    write_output,
)
from moa_dist.data.corpus import Corpus
from moa_dist.data.hold_out import HoldOut
from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.manifest import Manifest, sha256_of
from moa_dist.data.output_folder import check_output, put_in_place
from moa_dist.data.prepare_settings import Settings, describe_inputs
from moa_dist.data.spans import Span
from moa_dist.data.text import check_any_text
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.data.tokenizer import DEFAULT_SAMPLE_BYTES, Tokenizer, load_tokenizer
from moa_dist.data.work_folder import continued, hidden_folder, work_folder
from moa_dist.errors import DataError

DEFAULT_SAMPLES_PER_SHARD = 4096


@dataclass(frozen=True)
class Prepared:
    """Describes what `prepare` or `join_parts` wrote."""

    manifests: dict[Path, Manifest]
    """The manifest of each folder of shards."""
    counts: TextCounts
    """Counts of the text that was read."""
    held_out: str | None
    """What the validation split holds, in words; None without one."""
    discarded: list[str]
    """How the unfinished work of an earlier run, which was deleted, differs from this one."""


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

    The same inputs and options give byte-identical files. If an earlier run with them was
    interrupted, continues its work; unfinished work of others is deleted.

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
    given = given_tokenizer(tokenizer, end_of_document)
    settings = Settings(
        block_length=block_length,
        samples_per_shard=samples_per_shard,
        valid_share=valid_share,
        seed=seed,
        text=text or TextOptions(),
        tokenizer=sha256_of(given.to_json().encode()) if given else None,
        vocab_size=None if given else vocab_size,
        tokenizer_sample_bytes=None if given else tokenizer_sample_bytes,
    )
    settings.check()
    check_output(output, force)
    with work_folder(hidden_folder(output), output) as work:
        left_out = LeftOut()
        files = find_files(inputs, stdin, work / "stdin", left_out)
        settings = settings.model_copy(update={"inputs": describe_inputs(files, work / "stdin")})
        folder, discarded = continued(work, settings)
        spans = [Span(file) for file in files]
        corpus = Corpus(spans, settings, folder, progress)
        parts = [TokenizedPart(folder, spans)]
        used, hold_out, counts = _tokenized(corpus, parts, given, settings)
        shards = empty_folder(work / "shards")
        manifests = write_output(
            parts, hold_out, used, settings, shards, empty_folder(work / "shuffle"), progress
        )
        put_in_place(shards, output)
        shutil.rmtree(work)
    left_out.update(counts.left_out)
    counts.left_out = left_out
    return prepared(output, manifests, counts, hold_out, discarded)


def given_tokenizer(tokenizer: Path | None, end_of_document: str | None) -> Tokenizer | None:
    """Load the tokenizer that was given, if any.

    Raises:
        DataError: it cannot be loaded, or its end of documents is named, but not the tokenizer.
    """
    if tokenizer is not None:
        return load_tokenizer(tokenizer, end_of_document)
    if end_of_document is not None:
        raise DataError(
            "--end-of-document names a token of a given tokenizer; give one with --tokenizer",
            key="--end-of-document",
        )
    return None


def prepared(
    output: Path,
    manifests: dict[str, Manifest],
    counts: TextCounts,
    hold_out: HoldOut | None,
    discarded: list[str],
) -> Prepared:
    """Describe an output."""
    by_folder = {output / split: manifest for split, manifest in manifests.items()}
    return Prepared(by_folder, counts, hold_out.what if hold_out else None, discarded)


def empty_folder(folder: Path) -> Path:
    """Create a folder, without what an interrupted run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _tokenized(
    corpus: Corpus,
    parts: Sequence[TokenizedPart],
    given: Tokenizer | None,
    settings: Settings,
) -> tuple[Tokenizer, HoldOut | None, TextCounts]:
    """Tokenize the text with the given tokenizer, or a trained one; plan what is held out."""
    if given:
        counts = corpus.tokenize(given)
        check_any_text(counts.files_opened, counts)
        return given, plan_hold_out(parts, settings), counts
    used, trained_on = corpus.trained_tokenizer()
    counts = corpus.tokenize(used)
    if trained_on.is_final:
        return used, trained_on.hold_out, counts
    hold_out = plan_hold_out(parts, settings)
    if hold_out and hold_out != trained_on.hold_out:
        used = corpus.trained_again(hold_out)
        counts = corpus.tokenize(used)
    return used, hold_out, counts
